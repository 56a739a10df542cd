"""Runs the benchmarks: ``python benchmarks/run.py [--quick] [--only ops|models|search] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from cases import DTYPES, Case, Ceilings, Settings, run_case
from checks import WrongResultError
from harness import GRAPH
from machine import describe
from report import RESULTS, Record, Results, bars_table, page, rewrite

from diffrate_ext.running import summary

OPERATORS = (
    "sort_tokens",
    "prune_merge",
    "add_norm",
    "merge_reduce",
    "bipartite_match",
    "class_attention",
    "received_attention",
    "proportional_attention",
    "masked_attention",
    "compression_rate",
    "masked_prune_merge",
)


Job = tuple[dict[str, Any], Callable[[], Record]]
"""What names a record, and what makes it."""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the convolutions of patch embeddings, too
    if arguments.output:
        output = arguments.output
    elif arguments.quick:
        # too few rounds to stand beside the measured results
        output = Path(tempfile.mkdtemp(prefix="diffrate_benchmarks_"))
    else:
        output = RESULTS
    suffix = "" if dtype == torch.float32 else f"_{arguments.dtype}"
    start = time.monotonic()
    machine = describe(device)

    parts: dict[str, Callable[[], Iterable[Job]]] = {
        "ops": partial(operator_jobs, Settings(device, dtype, arguments.quick), arguments.operators, arguments.bars),
        "models": partial(model_jobs, device, dtype, arguments.quick, arguments.compile_models, arguments.bars),
    }
    if dtype == torch.float32:
        parts["search"] = partial(search_jobs, device, arguments.quick)
    written = []
    for part, jobs in parts.items():
        if arguments.only in (None, part):
            file = output / f"{device.type}_{part}{suffix if part != 'search' else ''}.json"
            results = Results(file, machine, resume=arguments.resume, restart=arguments.restarted)
            work(jobs(), results, restart=partial(restart, output) if device.type == "cuda" else None)
            written.append(results)

    if output.resolve() == RESULTS:
        rewrite(output)
    for results in written:
        print(f"\n{page(results.path, results.content)}\n{results.path.with_suffix('.md')}")
    print(f"\n{time.monotonic() - start:.0f} s")
    return 1 if any(results.failures for results in written) else 0


def work(jobs: Iterable[Job], results: Results, restart: Callable[[], NoReturn] | None) -> None:
    """Does what has no record yet and writes each result as it comes. What fails is noted, and the others go on.

    ``restart``: called after what a CUDA process does not survive, an error on the device or a capture that failed.
    """
    for key, job in jobs:
        if results.has(key):
            continue
        progress(", ".join(map(str, key.values())))
        try:
            record = job()
        except (WrongResultError, RuntimeError) as error:
            results.fail(key, summary(error))
            progress(f"FAILED: {summary(error)}")
            lost = isinstance(error, RuntimeError)
        else:
            results.add(record)
            for line in bars_table([record]).splitlines()[2:]:
                progress(line)
            lost = any(name.endswith(GRAPH) for name in record["unavailable"])
        if lost and restart is not None:
            restart()


def restart(output: Path) -> NoReturn:
    """The same run again, in a new process, which goes on after what this one did."""
    flags = ["--resume", "--restarted", "--output", str(output)]
    os.execv(sys.executable, [sys.executable, *sys.argv, *flags])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times operators and whole models against their rivals.")
    parser.add_argument(
        "--quick", action="store_true", help="under two minutes: small cases, few rounds, results in a temporary folder"
    )
    parser.add_argument(
        "--only", choices=["ops", "models", "search"], help="only operators, whole models, or steps of the rate search"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument(
        "--compile-models", action="store_true", help="also time torch.compile'd models (minutes per model on a CPU)"
    )
    parser.add_argument("--bars", action="store_true", help="only operators and models that have a bar to reach")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, help="only these operators")
    parser.add_argument("--resume", action="store_true", help="keep the records of an interrupted run and go on")
    parser.add_argument("--restarted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    return parser.parse_args(argv)


def operator_jobs(settings: Settings, operators: list[str] | None, with_bars: bool) -> Iterator[Job]:
    ceilings = Ceilings.measured(settings.device, settings.dtype)
    progress(f"ceilings: copy {ceilings.bandwidth / 1e9:.1f} GB/s, matrix product {ceilings.rate / 1e9:.0f} GFLOP/s")
    for name in operators or OPERATORS:
        cases: Iterable[Case] = importlib.import_module(f"ops.bench_{name}").cases(settings)
        for case in cases:
            if with_bars and not case.bars:
                continue
            yield {"operator": case.operator, "case": case.label}, partial(run_case, case, settings, ceilings)


def model_jobs(
    device: torch.device, dtype: torch.dtype, quick: bool, compile_models: bool, with_bars: bool
) -> Iterator[Job]:
    from models import plan, run_model

    for run in plan(device, dtype, quick=quick, compile_models=compile_models):
        if with_bars and not (run.bars or run.gains):
            continue
        yield run.key, partial(run_model, run, device, dtype, quick=quick)


def search_jobs(device: torch.device, quick: bool) -> Iterator[Job]:
    from search_step import run_search_step, searches

    for spec in searches(device, quick=quick):
        yield spec.key, partial(run_search_step, spec, device, quick=quick)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
