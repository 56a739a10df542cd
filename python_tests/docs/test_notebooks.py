"""The notebooks of examples/ run from their first cell to their last, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from markdown_pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def test_there_are_two() -> None:
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(notebook: Path) -> None:
    for cell in cells_of(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_runs: None, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells_of(notebook), start=1):
        lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]  # for IPython
        exec(compile("\n".join(lines), f"{notebook.name}, code cell {number}", "exec"), namespace)
    assert "top-1" in capsys.readouterr().out
