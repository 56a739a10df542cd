"""Which steps of a run leave a record."""

from __future__ import annotations

MOST_RECORDS = 500
"""Kept of one run, and one more for its last step."""


def is_recorded(step: int, steps: int) -> bool:
    """Whether a step, counted from 0, is among those that are recorded: evenly spaced ones and the last."""
    return step % -(-steps // MOST_RECORDS) == 0 or step == steps - 1
