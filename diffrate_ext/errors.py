"""Errors that the caller can mend: bad input, a model or a file that does not fit.

Each is a built-in error besides (``ValueError``, ``TypeError``), so that callers may catch either. The command line
shows them in one line, without a traceback.
"""

from __future__ import annotations


class InputError(Exception):
    """Base class of all errors that name what came and what was expected."""


class InputValueError(InputError, ValueError):
    """A value that is out of range or does not fit."""


class InputTypeError(InputError, TypeError):
    """A value of the wrong type, or a model of a family that is not supported."""


class DivergedError(InputError, FloatingPointError):
    """Training went astray: a loss, a gradient or the rates are not finite."""
