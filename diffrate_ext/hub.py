"""The Hugging Face hub, and what is said where it has no weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputValueError

PATIENCE = 5.0
"""Seconds to wait for it."""
UNREACHABLE = "they are not on this machine, and the Hugging Face hub cannot be reached"


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, or is not to be asked.

    Its own client finds out by ten attempts, which take 46 seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # each release of the client has errors of its own
        return False
    return True


@contextmanager
def from_the_cache_alone() -> Iterator[None]:
    """Within a ``with`` block the hub's client does not try the network."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def no_pretrained(name: str, reason: str) -> InputValueError:
    """What to raise where a model's weights cannot be had."""
    return InputValueError(
        f"no pretrained weights for {name}: {reason}. "
        "Give local ones with --weights FILE, or try it with random ones: --no-pretrained"
    )
