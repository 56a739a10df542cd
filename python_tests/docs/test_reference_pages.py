"""Pages that are to list everything do so, and links out of ``docs/`` lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from types import ModuleType, SimpleNamespace

import pytest
from markdown_pages import ROOT

import diffrate_ext
from diffrate_ext import ops
from diffrate_ext.methods import METHODS


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("write_option_tables")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_option_tables_are_those_of_the_parser(tables: ModuleType) -> None:
    found = page("command_line.md")
    assert found == tables.with_tables(found), "run: python scripts/write_option_tables.py"


def test_every_command_has_a_section_a_table_and_a_line_in_the_list(tables: ModuleType) -> None:
    found = page("command_line.md")
    commands = list(tables.commands())
    assert "search" in commands
    assert re.findall(r"^## diffrate (\S+)$", found, re.MULTILINE) == re.findall(r"<!-- options of (\S+) -->", found)
    assert sorted(re.findall(r"<!-- options of (\S+) -->", found)) == sorted(commands)
    assert sorted(re.findall(r"^\| \[`(\S+)`\]\(#diffrate-\1\) \|", found, re.MULTILINE)) == sorted(commands)


def test_a_table_that_is_stale_is_found(tables: ModuleType) -> None:
    found = page("command_line.md")
    assert "`--json`" in found
    stale = found.replace("| `--json` | print JSON instead of a table |\n", "")
    assert stale != found
    assert tables.with_tables(stale) == found


def test_the_api_reference_has_all_public_names() -> None:
    listed = re.findall(r"^::: (\S+)$", page("api.md"), re.MULTILINE)
    modules = {"ops", "reference"}
    public = {f"diffrate_ext.{name}" for name in diffrate_ext.__all__ if name not in modules}
    public |= {f"diffrate_ext.ops.{name}" for name in ops.__all__}
    assert sorted(listed) == sorted(public)


def test_the_page_of_operators_names_them_all() -> None:
    functions = [name for name in ops.__all__ if name.islower()]
    assert "prune_merge" in functions
    assert [name for name in functions if f"[`{name}`][diffrate_ext.ops.{name}]" not in page("operators.md")] == []


def test_the_page_of_methods_names_them_and_their_options() -> None:
    found = page("methods.md")
    for name, method in METHODS.items():
        assert found.count(f"| `{name}` |") >= 2, name
        for option in (field.name for field in fields(method)):
            assert f"| `{option}` |" in found, (name, option)


def test_links_out_of_the_documentation() -> None:
    hooks = script("mkdocs_hooks")

    def resolved(markdown: str, url: str | None) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))
        return hooks.on_page_markdown(markdown, page=page, config=SimpleNamespace(repo_url=url), files=None)

    link = "see [how](../CONTRIBUTING.md#test) and [examples/](../examples), [here](page.md)"
    assert resolved(link, "https://host/us/") == (
        "see [how](https://host/us/blob/main/CONTRIBUTING.md#test) and "
        "[examples/](https://host/us/blob/main/examples), [here](page.md)"
    )
    assert resolved(link, None) == "see how (`CONTRIBUTING.md`) and `examples`, [here](page.md)"
    with pytest.raises(FileNotFoundError, match=r"page\.md links to \.\./no\.md"):
        resolved("[text](../no.md)", None)
