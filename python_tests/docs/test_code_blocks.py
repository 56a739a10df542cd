"""Every code block of README.md and docs/*.md does what it says, or at least parses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import diffrate_ext  # noqa: F401  before timm: it makes a torchvision of another torch importable

# isort: split
import pytest
import timm
import torch
from markdown_pages import PAGES, ROOT, blocks, name_of
from picture_files import class_folders

from diffrate_ext.cli.common import UsageError
from diffrate_ext.cli.main import build_parser

WITH_PYTHON = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), "python")]
WITH_BASH = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"), "bash")]


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_runs: None) -> dict[str, Any]:
    """What a page's first block finds: a model, batches of pictures, and ``pictures/`` where it runs.

    Nothing is downloaded: pretrained models have random weights.
    """
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        class_folders(tmp_path / "pictures" / split, ["cat", "dog"], each=1)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))

    model = create("deit_small_patch16_224").eval()
    batches = [(torch.randn(2, 3, 224, 224), torch.randint(0, 1000, (2,)))]
    return {"model": model, "images": batches[0][0], "loader": batches, "validation": batches}


def run_page(text: str, name: str, namespace: dict[str, Any]) -> int:
    """Run a page's Python blocks in order, in one namespace. Returns how many ran; the others only have to compile."""
    ran = 0
    for block in blocks(text, "python"):
        code = compile("\n" * (block.line - 1) + block.code, name, "exec")  # tracebacks name the page's own lines
        if block.runs:
            exec(code, namespace)
            ran += 1
    return ran


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page: Path, namespace: dict[str, Any]) -> None:
    run_page(page.read_text(encoding="utf-8"), name_of(page), namespace)


@pytest.mark.parametrize("page", WITH_BASH, ids=name_of)
def test_commands_parse(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        for words in commands_in(block.code) if block.runs else ():
            check_command(words, f"{name_of(page)}:{block.line}")


def commands_in(script: str) -> list[list[str]]:
    """The commands of a shell script, comments and continued lines taken care of."""
    commands: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        commands.append([])
        for word in lexer:
            if set(word) <= set("&;|"):
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def check_command(words: list[str], where: str) -> None:
    """The real parser takes what follows ``diffrate``; files of this repository that a command names exist."""
    arguments = None
    if words[0] == "diffrate":
        arguments = words[1:]
    elif "diffrate_ext" in words and words[words.index("diffrate_ext") - 1] == "-m":
        arguments = words[words.index("diffrate_ext") + 1 :]
    if arguments is not None:
        try:
            build_parser().parse_args(arguments)
        except UsageError as error:
            pytest.fail(f"{where}: {' '.join(words)}: {error}", pytrace=False)
    for word in words:
        if word.startswith(("benchmarks/", "scripts/", "python_tests/", "examples/")):
            assert (ROOT / word).exists(), f"{where}: there is no {word}"


# --- the checks themselves can fail


def test_a_name_that_a_page_does_not_define() -> None:
    page = "text\n\n```python\nx = 1\n```\n\n```python\nx + undefined\n```\n"
    with pytest.raises(NameError, match="undefined") as raised:
        run_page(page, "page.md", {})
    assert raised.traceback[-1].lineno == 7  # counted from 0
    assert run_page(page.replace(" + undefined", ""), "page.md", {}) == 2


def test_a_block_that_is_not_run_must_compile() -> None:
    page = "<!-- not run: why -->\n```python\nundefined\n```\n\n```python\n```\n"
    assert run_page(page, "page.md", {}) == 1
    with pytest.raises(SyntaxError):
        run_page(page.replace("undefined", "not valid ="), "page.md", {})
    with pytest.raises(NameError):  # a directive says why
        run_page(page.replace(": why", ":"), "page.md", {})


def test_an_option_that_does_not_exist() -> None:
    (words,) = commands_in("pip install . && diffrate evaluate --images a \\\n  --typo 3  # as it is")[1:]
    assert words == ["diffrate", "evaluate", "--images", "a", "--typo", "3"]
    for command in (words, ["torchrun", "-m", "diffrate_ext", *words[1:]]):
        with pytest.raises(pytest.fail.Exception, match="--typo"):
            check_command(command, "page.md")
    with pytest.raises(AssertionError, match="no_such"):
        check_command(["python", "benchmarks/no_such.py"], "page.md")
