"""Methods of token compression, one file each: what a block does to come down to its kept tokens."""

from __future__ import annotations

from dataclasses import fields

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
    """A method by its name, or as it is. A name may be followed by options: ``tome:proportional_attention=false``.

    Raises:
        InputTypeError: it is neither a name nor a Method.
        InputValueError: no method has that name, or it has no such option, or not with that value.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise InputTypeError(f"method must be a name or a Method, got the class: use {method.__name__}()")
    if not isinstance(method, str):
        raise InputTypeError(f"method must be a name or a Method, got {type(method).__name__}")
    name, _, options = method.partition(":")
    if name not in METHODS:
        raise InputValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[name](**_options(METHODS[name], options))


def _options(method: type[Method], text: str) -> dict[str, object]:
    """What ``name=value,name=value`` says about the options of a method."""
    defaults = {field.name: field.default for field in fields(method)}
    found: dict[str, object] = {}
    for option in text.split(",") if text else ():
        name, _, value = option.partition("=")
        if name not in defaults:
            known = f"the options {', '.join(defaults)}" if defaults else "no options"
            raise InputValueError(f"method {method.name!r} has {known}, got {option!r}")
        if isinstance(defaults[name], bool):
            if value not in ("true", "false"):
                raise InputValueError(f"option {name} of method {method.name!r} is true or false, got {value!r}")
            found[name] = value == "true"
        else:
            found[name] = value
    return found
