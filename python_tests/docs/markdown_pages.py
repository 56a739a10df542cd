"""The code blocks of README.md and docs/*.md."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE
)
_NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. ``<!-- not run: why -->`` before it says that it is only to be looked at."""

    language: str
    code: str
    line: int
    """Of the page, where the code begins."""
    runs: bool


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of one language in the text of a page."""
    return [
        Block(
            fence["language"],
            textwrap.dedent(fence["code"]),
            page.count("\n", 0, fence.start("code")) + 1,
            _NOT_RUN.search(page[: fence.start()]) is None,
        )
        for fence in _FENCE.finditer(page)
        if fence["language"] == language
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
