"""Models by name, with errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InputValueError
from .hub import UNREACHABLE, from_the_cache_alone, hub_answers, no_pretrained
from .transformers_loading import PREFIX, load_transformers_model

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def load_model(
    name: str, *, pretrained: bool = True, weights: str | Path | None = None, num_classes: int | None = None
) -> nn.Module:
    """As :func:`load_timm_model`; after ``"transformers:"``, as :func:`load_transformers_model`."""
    load = load_transformers_model if name.startswith(PREFIX) else load_timm_model
    return load(name.removeprefix(PREFIX), pretrained=pretrained, weights=weights, num_classes=num_classes)


def untrained_model(name: str, image_size: int | None = None) -> nn.Module:
    """A model with random weights, in evaluation mode: for measurements of speed.

    Args:
        name: as for :func:`load_model`.
        image_size: side of the images in pixels; by default the model's own.

    Raises:
        InputValueError: there is no such model, or none for images of that size.
    """
    if image_size is None:
        return load_model(name, pretrained=False)
    if name.startswith(PREFIX):
        return load_transformers_model(name.removeprefix(PREFIX), pretrained=False, image_size=image_size)
    return load_timm_model(name, pretrained=False, image_size=image_size)


def load_timm_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """A timm model in evaluation mode.

    Args:
        name: as for ``timm.create_model``, e.g. ``"deit_small_patch16_224.fb_in1k"``.
        pretrained: load the published weights, from the cache or over the network; else weights are random.
        weights: a local checkpoint (.safetensors, .pth) instead of the published weights.
        num_classes: of the head, where it is not the published one's.
        image_size: side of the images in pixels, where it is not the published one's.

    Raises:
        InputValueError: timm does not know the model, or the weights cannot be had or do not fit.
        FileNotFoundError: there is no file ``weights``.
    """
    import timm

    registered = not name.startswith(HUB_PREFIXES)
    if registered and not timm.is_model(name):
        if Path(name).is_dir():
            raise InputValueError(f"timm has no model {name!r}; for the folder of a transformers model: {PREFIX}{name}")
        near = _nearest(name.partition(".")[0], timm.list_models())
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise InputValueError(f"timm has no model {name!r}{hint}")
    pretrained = pretrained and weights is None
    if pretrained and registered and not timm.is_model_pretrained(name):
        # before the model is built: a large one takes a while
        raise no_pretrained(name, "timm names none")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"no such file of weights: {weights}")
    reachable = not pretrained or hub_answers()
    try:
        options: dict[str, Any] = {"pretrained": pretrained, "checkpoint_path": "" if weights is None else str(weights)}
        if num_classes is not None:
            options["num_classes"] = num_classes
        with nullcontext() if reachable else from_the_cache_alone():
            model = timm.create_model(name, **options) if image_size is None else _sized(name, image_size, options)
    except Exception as error:  # the hub clients raise errors of their own HTTP libraries, torch of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if weights is not None:
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = " (a head of another number of classes: --num-classes)" if "size mismatch for head" in words else ""
            raise InputValueError(f"the weights {weights} do not load into {name}{hint}: {words}") from error
        if not reachable:
            raise no_pretrained(name, UNREACHABLE) from error
        if pretrained:
            raise no_pretrained(name, reason.rstrip(".")) from error
        raise InputValueError(f"timm cannot build {name}: {reason}") from error
    return model.eval()


def _sized(name: str, image_size: int, options: dict[str, Any]) -> Any:
    """A timm model for images of one size."""
    import timm

    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # it takes images of any size, and its configuration says which it expects
        overlay = {"input_size": (3, image_size, image_size)}
        return timm.create_model(name, pretrained_cfg_overlay=overlay, **options)


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Names that begin so, the shortest first; else names that are spelled much like it, image size aside."""
    stems = sorted({one.partition("_patch")[0] for one in known})
    for stem in (name, *difflib.get_close_matches(name.partition("_patch")[0], stems, n=1)):
        longer = sorted((one for one in known if one.startswith(stem)), key=lambda one: (len(one), one))
        if longer:
            return longer[:3]
    return difflib.get_close_matches(name, known, n=3)
