"""Prints what an installed diffrate_ext requires: ``python scripts/requirements.py [dependencies] [EXTRA ...]``."""

from __future__ import annotations

import sys
from importlib.metadata import requires

for line in requires("diffrate_ext") or []:
    requirement, _, marker = (part.strip() for part in line.partition(";"))
    extra = marker.removeprefix("extra ==").strip(" \"'") if marker else "dependencies"
    if extra in sys.argv[1:]:
        print(requirement)
