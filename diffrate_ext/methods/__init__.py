"""Methods of token compression, one file each: what a block does to come down to its kept tokens."""

from __future__ import annotations

from ..errors import InputTypeError, InputValueError
from .diffrate import DiffRate
from .dynamicvit import DynamicViT
from .evit import EViT
from .method import Method, MethodPlan
from .predictors import Predictors
from .random import Random
from .tome import ToMe

__all__ = [
    "METHODS",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "Method",
    "MethodPlan",
    "Predictors",
    "Random",
    "ToMe",
    "method_of",
]

METHODS: dict[str, type[Method]] = {method.name: method for method in (DiffRate, ToMe, EViT, DynamicViT, Random)}
"""By the name that ``compress(method=...)`` and the command line take."""


def method_of(method: str | Method) -> Method:
    """A method by its name, or as it is.

    Raises:
        InputTypeError: it is neither a name nor a Method.
        InputValueError: no method has that name.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise InputTypeError(f"method must be a name or a Method, got the class: use {method.__name__}()")
    if not isinstance(method, str):
        raise InputTypeError(f"method must be a name or a Method, got {type(method).__name__}")
    if method not in METHODS:
        raise InputValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()
