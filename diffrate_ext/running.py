"""Ways to run a model: as it is, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

Way: TypeAlias = Literal["eager", "compiled", "graph"]
WAYS: tuple[Way, ...] = get_args(Way)


class UnavailableError(RuntimeError):
    """This machine cannot run a model in some way. The message says why."""


def in_way(
    way: Way, model: Callable[[Tensor], Any], images: Tensor
) -> tuple[Callable[[Tensor], Any] | None, str | None]:
    """A model as it is run in one of the ways, for images of this shape.

    A CUDA graph's calls return the same tensor each time, computed anew. After a capture that failed, torch's allocator
    is not to be trusted any more: whoever gets a reason must start a new process before the next capture.

    Returns:
        a function of images and None, or None and the reason why this machine cannot run the model so.
    """
    if way == "eager":
        return model, None
    if way == "compiled":
        return compiled(model, (images,))
    placed = images.clone()
    replay, reason = captured(lambda: model(placed))
    if replay is None:
        return None, reason

    def call(images: Tensor) -> Any:
        placed.copy_(images)
        return replay()

    return call, None


def compiled(call: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Callable[..., Any] | None, str | None]:
    """``torch.compile`` of a callable for these input shapes.

    Returns:
        the compiled callable and None, or None and the reason why this machine cannot compile it.
    """
    fast = torch.compile(call, fullgraph=True, dynamic=False)
    try:
        fast(*inputs)
    except Exception as error:  # the toolchain can fail in many ways, and all of them mean the same here
        return None, summary(error)
    return fast, None


def captured(call: Callable[[], Any]) -> tuple[Callable[[], Any] | None, str | None]:
    """A CUDA graph of one call, as :func:`in_way` says.

    Returns:
        what replays the graph and None, or None and the reason why the call cannot be captured.
    """
    if not torch.cuda.is_available():
        return None, "no GPU"
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries and kernels set themselves up, which a capture cannot record
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    except Exception as error:  # whatever the call does that a capture cannot record
        return None, summary(error)

    def replay() -> Any:
        graph.replay()
        return result

    return replay, None


def summary(error: Exception) -> str:
    """Its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
