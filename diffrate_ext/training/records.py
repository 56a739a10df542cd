"""What a run of training records, and how that is written."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

Measure = Literal["accuracy", "agreement", "cosine"]
"""What the accuracy of the records is: with soft targets agreement with the uncompressed model, of features cosine."""

MOST_RECORDS = 500
"""Kept of one run, and one more for its last step."""


def is_recorded(step: int, steps: int) -> bool:
    """Whether a step, counted from 0, is among those that are recorded: evenly spaced ones and the last."""
    return step % -(-steps // MOST_RECORDS) == 0 or step == steps - 1


def readable_json(content: Any) -> str:
    """Indented JSON with each list of numbers on a line of its own."""
    text = json.dumps(content, indent=2)
    return re.sub(r"\[[^][{}]*\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n"
