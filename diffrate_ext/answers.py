"""What a model says of images: its logits, or its features where it has no classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .errors import InputTypeError

NAMED = ("logits", "image_embeds", "pooler_output")
"""What transformers' models call it, what counts most first."""


def answer_of(output: Any) -> Tensor:
    """Logits or features (B, D) from what a model's forward returned: a tensor, or transformers' several by name.

    Raises:
        InputTypeError: it returned something else.
    """
    if isinstance(output, Tensor):
        return output
    for name in NAMED:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise InputTypeError(
        f"the model must return logits or features (B, D) as one tensor, or as {', '.join(NAMED)}; got a "
        f"{type(output).__name__}"
    )


def number_of_classes(model: nn.Module) -> int | None:
    """Classes that a model's answer is about, 0 where it is features, None where the model does not tell."""
    if hasattr(model, "main_input_name"):  # a model of transformers, whose classifiers alone have labels
        found: Any = getattr(model, "num_labels", 0)
    else:
        found = getattr(model, "num_classes", None)
    return found if isinstance(found, int) else None


def has_classes(model: nn.Module) -> bool:
    """Whether the answer is logits. So it is taken for where the model does not tell."""
    return number_of_classes(model) != 0
