"""A pytest plugin: tests that passed are written down as they do, and not run again by the next session.

For ``benchmarks/gpu.sh test``, whose time may end before the last test:
``PYTHONPATH=python_tests pytest -p passed_tests --passed FILE``.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, help="file of the tests that passed already")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--passed")) is not None:
        config.pluginmanager.register(PassedTests(file, writes=not hasattr(config, "workerinput")))


class PassedTests:
    """``writes``: not so in the workers of pytest-xdist, whose reports all come to the process that started them."""

    def __init__(self, file: Path, *, writes: bool) -> None:
        self.file, self.writes = file, writes
        self.passed = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.passed])
        items[:] = [item for item in items if item.nodeid not in self.passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.writes and report.when == "call" and report.passed:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")
