"""The processes that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputValueError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process's place among those that work together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """As torch.distributed has them; this process alone where it was not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def copy_first(self, values: Tensor) -> None:
        """Replace ``values`` by those of the first process."""
        if self.world > 1:
            dist.broadcast(values.detach(), 0)

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` in the first process alone; every process gets its result, or raises what it raised."""
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, raised = outcome
        if raised is not None:
            raise raised
        return result


def started_by_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes within a ``with`` block, when torchrun started this one.

    Args:
        device: where to work. With several processes ``cuda`` becomes the GPU of this process.

    Yields:
        the device of this process.

    Raises:
        InputValueError: more processes on this machine than it has GPUs.
    """
    if not started_by_torchrun():
        yield device
        return
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise InputValueError(f"process {local_rank} of this machine has no GPU of its own: there are {gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
