"""Models of Hugging Face's transformers by name, ready for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InputValueError
from .hub import UNREACHABLE, hub_answers, no_pretrained

PREFIX = "transformers:"

_CLASSES: Mapping[str, tuple[str, str | None]] = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", None),
    "clip": ("CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    "clip_vision_model": ("CLIPVisionModel", None),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification"),
    "siglip_vision_model": ("SiglipVisionModel", None),
}
"""For each type of model its class without classes, and with."""

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which image processors use."""


def load_transformers_model(
    name: str, *, pretrained: bool = True, weights: str | Path | None = None, num_classes: int | None = None
) -> nn.Module:
    """A vision transformer of ``transformers``, in evaluation mode; of a model of images and text the image tower.

    Args:
        name: on the Hugging Face hub, or a folder that ``save_pretrained`` wrote.
        pretrained: load the published weights, from the cache or over the network; else weights are random.
        weights: a local checkpoint (.safetensors) of the same model instead of the published weights.
        num_classes: of the head, where it is not the published one's.

    Raises:
        InputValueError: transformers is not installed, it has no such model, or it is of a type that is not supported;
            the weights cannot be had or do not fit.
        FileNotFoundError: there is no file ``weights``.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputValueError(f"{PREFIX}{name} needs the package transformers: pip install transformers") from error
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"no such file of weights: {weights}")
    known: dict[str, Any] = {"local_files_only": not (Path(name).is_dir() or hub_answers())}
    if known["local_files_only"] and weights is None and pretrained:
        reason: str | None = UNREACHABLE
    else:
        reason = None
    try:
        config = transformers.AutoConfig.from_pretrained(name, **known)
    except Exception as error:  # the hub's client raises errors of its own HTTP library
        why = reason or _first_line(error)
        raise InputValueError(f"transformers cannot load {name}, neither a folder nor from the hub: {why}") from error
    cls: Any = getattr(transformers, _class_for(config, name, num_classes))
    head: dict[str, Any] = {} if num_classes is None else {"num_labels": num_classes}
    logging, verbosity = transformers.logging, transformers.logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists a text tower's weights, and a new head's, as not used
    try:
        if pretrained and weights is None:
            options = {"ignore_mismatched_sizes": True} if head else {}
            model = cls.from_pretrained(name, **known, **head, **options)
        else:
            model = cls(cls.config_class.from_pretrained(name, **known, **head))
    except Exception as error:
        raise no_pretrained(name, reason or _first_line(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    if weights is not None:
        _load_weights(model, weights, name)
    model.pretrained_cfg = _data_config(name, model, known)  # as timm's models have it
    return model.eval()


def _class_for(config: Any, name: str, num_classes: int | None) -> str:
    base, classifier = _CLASSES.get(config.model_type, (None, None))
    if base is None:
        raise InputValueError(
            f"{name} is a {config.model_type!r} model, which is not supported: expected {', '.join(_CLASSES)}"
        )
    saved = (getattr(config, "architectures", None) or [base])[0]
    if num_classes is not None:
        if classifier is None:
            raise InputValueError(f"{name} is a {config.model_type!r} model, which has no classes: go without a number")
        return classifier
    return saved if saved in (classifier, "CLIPVisionModel") else base


def _load_weights(model: nn.Module, weights: str | Path, name: str) -> None:
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:  # safetensors has errors of its own
        words = " ".join(str(error).split())[:300]
        hint = " (a head of another number of classes: --num-classes)" if "classifier" in words else ""
        raise InputValueError(f"the weights {weights} do not load into {name}{hint}: {words}") from error


def _data_config(name: str, model: Any, known: dict[str, Any]) -> dict[str, Any]:
    """What the model expects of its images, by the image processor beside its weights."""
    from transformers.image_processing_base import ImageProcessingMixin

    config = getattr(model.config, "vision_config", model.config)
    side = config.image_size
    rows, columns = (side, side) if isinstance(side, int) else side
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, **known)
    except OSError:  # without one, as its own image processor by default has it
        processor = {}
    cropped = processor.get("do_center_crop", False)
    return {
        "input_size": (getattr(config, "num_channels", 3), rows, columns),
        "mean": tuple(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        "std": tuple(processor.get("image_std") or (0.5, 0.5, 0.5)),
        "interpolation": _INTERPOLATIONS.get(processor.get("resample", 2), "bilinear"),
        "crop_pct": min(1.0, _side(processor.get("crop_size")) / _side(processor.get("size"))) if cropped else 1.0,
        "crop_mode": "center" if cropped else "squash",
    }


def _side(size: Any) -> int:
    """One side of an image processor's size: it comes as a number, or by name."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    return int(size or 224)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
