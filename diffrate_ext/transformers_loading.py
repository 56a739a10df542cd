"""Models of Hugging Face's transformers by name, ready for pictures."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """A vision transformer of ``transformers``, in evaluation mode; of a model of images and text the image tower.

    Args:
        name: on the Hugging Face hub, or a folder that ``save_pretrained`` wrote.
        pretrained: load the published weights, from the cache or over the network; else weights are random.
        weights: a local checkpoint (.safetensors) of the same model instead of the published weights.
        num_classes: of the head, where it is not the published one's.
        image_size: side of the images in pixels of a model with random weights.

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
        raise InputValueError(f"transformers cannot load {name!r}, as a folder or from the hub: {why}") from error
    cls: Any = getattr(transformers, _class_for(config, name, num_classes))
    head: dict[str, Any] = {} if num_classes is None else {"num_labels": num_classes}
    logging, verbosity = transformers.logging, transformers.logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists a text tower's weights, and a new head's, as not used
    try:
        if weights is not None:
            model = _with_weights(cls, cls.config_class.from_pretrained(name, **known, **head), weights, name)
        elif pretrained:
            options = {"ignore_mismatched_sizes": True} if head else {}
            model, info = cls.from_pretrained(name, **known, **head, **options, output_loading_info=True)
            _check_complete(model, info, name, new_head=bool(head))
        else:
            size = {} if image_size is None else {"image_size": image_size}
            model = cls(cls.config_class.from_pretrained(name, **known, **head, **size))
    except InputValueError:
        raise
    except Exception as error:
        raise no_pretrained(name, reason or _first_line(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    model.pretrained_cfg = _data_config(name, model, known)  # type: ignore[assignment]  # as timm's models have it
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
    return saved if saved in (classifier, "CLIPVisionModel", "CLIPVisionModelWithProjection") else base


def _with_weights(cls: Any, config: Any, weights: str | Path, name: str) -> nn.Module:
    """A model with the weights of a file, read by transformers, which knows what they were called before."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        kind = "model.safetensors" if Path(weights).suffix == ".safetensors" else "pytorch_model.bin"
        (Path(folder) / kind).symlink_to(Path(weights).resolve())
        try:
            model, info = cls.from_pretrained(folder, output_loading_info=True)
        except Exception as error:  # safetensors, pickle and transformers have errors of their own
            words = " ".join(str(error).split())[:300]
            hint = " (a head of another number of classes: --num-classes)" if "size mismatch" in words else ""
            raise InputValueError(f"the weights {weights} do not load into {name}{hint}: {words}") from error
    _check_complete(model, info, f"{name}, of {weights}")
    model.config.name_or_path = name
    loaded: nn.Module = model
    return loaded


def _check_complete(model: Any, info: Any, name: str, *, new_head: bool = False) -> None:
    """Refuse a model some of whose weights are random. A pooler that was not trained becomes the class token."""
    missing = {key for key in info["missing_keys"] if not (new_head and key.startswith("classifier."))}
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = ClassToken()
    elif missing:
        some = ", ".join(sorted(missing)[:3])
        raise InputValueError(f"the weights of {name} do not load: {len(missing)} are missing, such as {some}")


class ClassToken(nn.Module):
    """In place of a pooler that was never trained: the class token (B, C) of tokens (B, N, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _data_config(name: str, model: Any, known: dict[str, Any]) -> dict[str, Any]:
    """What the model expects of its images, by the image processor beside its weights."""
    from transformers.image_processing_base import ImageProcessingMixin

    config = getattr(model.config, "vision_config", model.config)
    side = config.image_size
    rows, columns = (side, side) if isinstance(side, int) else side
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, **known)
    except OSError:
        processor = {}
        warnings.warn(
            f"{name} comes without an image processor: pictures are read with mean 0.5 and standard deviation 0.5",
            stacklevel=3,
        )
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
