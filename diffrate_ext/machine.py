"""The machine that a measurement runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

KEPT_BLOCKS = 31 * 2**20
"""Bytes: just below the largest block that glibc ever keeps, M_MMAP_THRESHOLD's maximum."""
BUSY = 0.5
"""Of the cores that this process may use; from here on timings are not to be trusted."""


def busy_machine() -> str | None:
    """A remark where the machine has had much to do in the last minute; None where it had not, or does not say.

    To be asked before the work starts: later the load is one's own.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if load < BUSY * cores:
        return None
    return (
        f"The machine is busy (load {load:.1f} on {cores} cores): speeds below are too low, and speed-ups less certain."
    )


def settle_memory() -> None:
    """Before a CPU is timed: let malloc keep what it gets, as in a process that has run for a while.

    Until a block of some size was freed once, glibc gives such blocks back to the system after every use, and pays for
    new pages when it takes the next. That costs the uncompressed model, whose activations are larger, up to a third of
    its time, and hardly anything the compressed one; how much changes from process to process.
    """
    torch.empty(KEPT_BLOCKS, dtype=torch.uint8)


def place(device: str) -> str:
    """A device as the caption of a table names it: a CPU by the threads that torch uses."""
    threads = torch.get_num_threads()
    return device if device != "cpu" else f"{threads} CPU thread{'s' if threads > 1 else ''}"


def processor(device: torch.device) -> str:
    """A device by the name that its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
