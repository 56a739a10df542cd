"""Checks that the settings of all trainings share."""

from __future__ import annotations

import math

from ..errors import InputValueError


def check_whole_numbers(settings: object, **least: int) -> None:
    """Raise InputValueError where a named setting is no whole number of at least so much; None is left alone."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < bound):
            raise InputValueError(f"{name} must be a whole number of at least {bound}, got {value!r}")


def check_amounts(settings: object, *names: str) -> None:
    """Raise InputValueError where a named setting is negative or not finite; None is left alone."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value < math.inf:
            raise InputValueError(f"{name} must be a finite number of at least 0, got {value!r}")
