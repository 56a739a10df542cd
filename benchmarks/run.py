"""Runs the benchmarks: ``python benchmarks/run.py [--quick] [--only ops|models|search] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from cases import DTYPES, Case, Ceilings, Settings, run_case
from machine import describe
from report import Results, bars_table, index_page, models_table, operators_table, search_table

HERE = Path(__file__).resolve().parent
OPERATORS = (
    "sort_tokens",
    "prune_merge",
    "merge_reduce",
    "class_attention",
    "received_attention",
    "proportional_attention",
    "masked_attention",
    "compression_rate",
    "masked_prune_merge",
)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    if arguments.output:
        output = arguments.output
    elif arguments.quick:
        # too few rounds to stand beside the measured results
        output = Path(tempfile.mkdtemp(prefix="diffrate_benchmarks_"))
    else:
        output = HERE / "results"
    suffix = "" if dtype == torch.float32 else f"_{arguments.dtype}"
    start = time.monotonic()
    machine = describe(device)

    written = []
    if arguments.only in (None, "ops"):
        results = Results(output / f"{device.type}_ops{suffix}.json", machine, resume=arguments.resume)
        run_operators(Settings(device, dtype, arguments.quick), results)
        written.append((results, operators_table(results.records)))
    if arguments.only in (None, "models"):
        results = Results(output / f"{device.type}_models{suffix}.json", machine, resume=arguments.resume)
        run_models(results, device, dtype, quick=arguments.quick, compile_models=arguments.compile_models)
        written.append((results, models_table(results.records)))

    if arguments.only in (None, "search") and dtype == torch.float32:
        results = Results(output / f"{device.type}_search.json", machine, resume=arguments.resume)
        run_searches(results, device, quick=arguments.quick)
        written.append((results, search_table(results.records)))

    (output / "README.md").write_text(index_page(output), encoding="utf-8")
    for results, table in written:
        print(f"\n{table}\n\n{results.path.with_suffix('.md')}")
    print(f"\n{time.monotonic() - start:.0f} s")
    return 0


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
    parser.add_argument("--resume", action="store_true", help="keep the records of an interrupted run and go on")
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    return parser.parse_args(argv)


def run_operators(settings: Settings, results: Results) -> None:
    ceilings = Ceilings.measured(settings.device, settings.dtype)
    progress(f"ceilings: copy {ceilings.bandwidth / 1e9:.1f} GB/s, matrix product {ceilings.rate / 1e9:.0f} GFLOP/s")
    for name in OPERATORS:
        cases: Iterable[Case] = importlib.import_module(f"ops.bench_{name}").cases(settings)
        for case in cases:
            if results.has(operator=case.operator, case=case.label):
                continue
            progress(f"{case.operator}, {case.label}")
            record = run_case(case, settings, ceilings)
            results.add(record, operators_table([*results.records, record]))


def run_models(
    results: Results, device: torch.device, dtype: torch.dtype, *, quick: bool, compile_models: bool
) -> None:
    from models import MODELS, QUICK_MODELS, run_model

    for spec in QUICK_MODELS if quick else MODELS:
        if all(results.has(model=spec.name, batch=batch) for batch in spec.batches):
            continue
        progress(spec.name)
        for record in run_model(spec, device, dtype, quick=quick, compile_models=compile_models):
            if not results.has(model=spec.name, batch=record["batch"]):
                results.add(record, models_table([*results.records, record]))
                for line in bars_table([record]).splitlines()[2:]:
                    progress(line)


def run_searches(results: Results, device: torch.device, *, quick: bool) -> None:
    from search_step import QUICK_SEARCHES, SEARCHES, run_search_step

    for spec in QUICK_SEARCHES if quick else SEARCHES:
        if not results.has(model=spec.name, batch=spec.batch):
            progress(f"search step, {spec.name}")
            record = run_search_step(spec, device, quick=quick)
            results.add(record, search_table([*results.records, record]))
            for line in bars_table([record]).splitlines()[2:]:
                progress(line)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
