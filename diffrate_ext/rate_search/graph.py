"""A search step replayed from a CUDA graph: one launch for the host instead of thousands.

The whole step is one graph: the uncompressed model's answers, the forward pass, the loss, its gradients and the numbers
that are reported. ``torch.cuda.make_graphed_callables`` would make two graphs, of a forward and a backward pass, and
take neither None for labels nor autocast with its cache; and a capture of our own is twenty lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputValueError

WARM_UP_CALLS = 3

Results: TypeAlias = tuple[Tensor, ...]
Record: TypeAlias = Callable[[Callable[[], Results]], tuple[Results, Callable[[], None]]]
"""Records a call. Returns its results, and what computes them anew into the same memory."""


class Replayed:
    """A function that computes in its first call, is recorded then, and replayed in later ones.

    A replay does on the device what the recorded call did, and nothing else: Python does not run. So the function must
    do the same each time, and what it reads beside its arguments must stay in its place in memory. Arguments of another
    shape or dtype than the first ones, such as a smaller last batch, are not replayed: the function is called.

    Args:
        function: of tensors and None. What it returns is overwritten by the next replay.
        record: as :func:`record_cuda_graph` with its device.
    """

    def __init__(self, function: Callable[..., Results], record: Record) -> None:
        self.function, self.record = function, record
        self.inputs: tuple[Tensor | None, ...] | None = None

    def __call__(self, *inputs: Tensor | None) -> Results:
        if self.inputs is None:
            results = self.function(*inputs)  # before recording, which draws random numbers of its own
            self.inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
            self.results, self.replay = self.record(partial(self.function, *self.inputs))
            return results
        if [_kind(tensor) for tensor in inputs] != [_kind(tensor) for tensor in self.inputs]:
            return self.function(*inputs)
        for place, tensor in zip(self.inputs, inputs, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        self.replay()
        return self.results


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def check_recordable(model: nn.Module, device: torch.device, processes: int) -> None:
    """Raise InputValueError where it is clear beforehand that a search of this model cannot be replayed."""
    if device.type != "cuda":
        raise InputValueError(f"cuda_graph needs a model on a CUDA device; this one is on {device}")
    if processes > 1:
        raise InputValueError(f"cuda_graph is for a search in one process; there are {processes}")
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise InputValueError(
                f"{name or 'the model'} has hooks, which a CUDA graph does not call: "
                "remove them, or search without cuda_graph"
            )


def record_cuda_graph(device: torch.device, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """Capture a call, as :data:`Record`.

    Raises:
        InputValueError: the call does what a graph cannot hold. torch's state on the device is not to be trusted then.
    """
    with torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up for each stream, which a capture cannot record
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            # thread_local: the loader's thread that pins memory may go on
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = call()
        except RuntimeError as error:
            # what failed within the capture made its end fail, too
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().partition("\n")[0]
            raise InputValueError(
                f"the search step of this model cannot be captured in a CUDA graph ({reason}): "
                "search without cuda_graph, in a new process"
            ) from cause
    return results, graph.replay
