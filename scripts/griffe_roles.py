"""Links in the API reference for the docstrings' cross-references, which are written as ``:func:`compress```.

An extension of Griffe, which reads the sources for mkdocstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?([\w.]+)`")
_API = Path(__file__).resolve().parent.parent / "docs/api.md"


class DocstringRoles(griffe.Extension):
    def __init__(self) -> None:
        self.public = set(re.findall(r"^::: (\S+)$", _API.read_text(encoding="utf-8"), re.MULTILINE))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda role: self._link(role[1], obj), obj.docstring.value)

    def _link(self, name: str, obj: griffe.Object) -> str:
        owner = obj if obj.is_class else obj.parent  # what a bare name of a method belongs to
        methods = [f"diffrate_ext.{owner.name}.{name}"] if owner is not None and name in owner.members else []
        for path in (name, f"diffrate_ext.{name}", f"diffrate_ext.ops.{name}", *methods):
            if path in self.public or path.rpartition(".")[0] in self.public:
                return f"[`{name}`][{path}]"
        return f"`{name}`"
