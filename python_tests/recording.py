"""What stands for a CUDA graph on the CPU: a call recorded operator by operator, and replayed without Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffrate_ext.rate_search import loop

WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
FROM_THE_HOST = {"aten::lift_fresh"}  # what torch.tensor does with Python's numbers
WARM_UP_CALLS = 2
LOOKS_ON_THE_CPU_ONLY = {
    "rate_search.rates": "_check_finite",
    "ops.masked_prune_merge": "_check_kept",
    "ops.compose_slots": "check_range",
    "ops.restore_tokens": "check_range",
}


class Recording(TorchDispatchMode):
    """Notes each operator with its very tensors. A replay calls it again and writes the results where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function._schema.name in WAITS | FROM_THE_HOST:
            raise RuntimeError(f"{function} while recording")
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, arguments, options, result in self.calls:
            for place, value in zip(tree_leaves(result), tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():  # neither a view nor in place
                    place.copy_(value)


def record(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """As ``diffrate_ext.rate_search.graph.record_cuda_graph``. The results hold nothing before the first replay."""
    for _ in range(WARM_UP_CALLS):
        call()
    with Recording() as recording:
        results = call()
    for result in results:
        result.fill_(torch.nan)
    return results, recording.replay


@contextmanager
def on_the_cpu(monkeypatch: Any) -> Iterator[list[int]]:
    """Searches with ``cuda_graph`` run on the CPU, within a ``with`` block. Yields one number for each replay."""
    replays: list[int] = []

    def counted(device: torch.device, call: Callable[[], tuple[Tensor, ...]]) -> Any:
        results, replay = record(call)

        def counting() -> None:
            replays.append(len(replays))
            replay()

        return results, counting

    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_recordable", lambda model, device, processes: None)
        patch.setattr(loop, "record_cuda_graph", counted)
        for module, check in LOOKS_ON_THE_CPU_ONLY.items():
            patch.setattr(importlib.import_module(f"diffrate_ext.{module}"), check, lambda *_: None)
        yield replays
