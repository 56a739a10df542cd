"""Prints requirements that pyproject.toml lists: ``python scripts/requirements.py [dependencies] [EXTRA ...]``."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
for name in sys.argv[1:]:
    print(*(project["dependencies"] if name == "dependencies" else project["optional-dependencies"][name]), sep="\n")
