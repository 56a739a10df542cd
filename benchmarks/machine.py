"""What the benchmarks ran on: its description, and the ceilings that times are held against."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and build, as they belong beside every result."""
    import timm

    import diffrate_ext

    description: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": commit(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "diffrate_ext": diffrate_ext.build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_multiprocessors"] = properties.multi_processor_count
        description["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["cuda"] = torch.version.cuda
    return description


def gpu_line() -> str:
    """Which GPU, when, and what it runs: for pages of results that are not measurements."""
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{torch.cuda.get_device_name()}, {today}, torch {torch.__version__}, commit {commit() or 'unknown'}"


def commit() -> str | None:
    """The checkout's commit, "+" where its sources were changed since; None where there is no git or no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "diffrate_ext", "benchmarks/*.py")
        return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_time(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """A ceiling is what the machine can do, so the fastest of several runs, not their median."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written bytes both counted.

    On a CPU the best of copies inside and outside the caches: operators find their inputs where the previous layer left
    them, often in a cache. On a GPU one copy far larger than its cache.
    """
    sizes = [2**30] if device.type == "cuda" else [2**21, 2**23, 2**25, 2**28]
    best = 0.0
    for size in sizes:
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        seconds = _best_time(lambda a=target, b=source: a.copy_(b), device, 10)  # type: ignore[misc]
        best = max(best, 2 * size / seconds)
    return best


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, a multiply-accumulate counted as two."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best_time(lambda: a @ b, device, 5)


def cache_bytes(device: torch.device) -> int:
    """Size of the cache that repeated runs over the same inputs would measure instead of the memory; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


if __name__ == "__main__":
    print(gpu_line())
