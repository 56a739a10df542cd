"""Results as JSON, and the Markdown tables made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
COMPILED = ", compiled"


class Results:
    """One JSON file of records, rewritten after each so that an interrupted run can go on where it stopped."""

    def __init__(self, path: Path, machine: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine, "records": []}
        if resume and path.exists():
            self.content["records"] = json.loads(path.read_text(encoding="utf-8"))["records"]
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def records(self) -> list[Record]:
        return self.content["records"]

    def has(self, **key: Any) -> bool:
        return any(all(record[name] == value for name, value in key.items()) for record in self.records)

    def add(self, record: Record, table: str) -> None:
        """Appends a record and writes the JSON, and beside it a Markdown page around ``table``."""
        self.records.append(record)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        page = f"{machine_line(self.content['machine'])}\n\n{table}\n"
        self.path.with_suffix(".md").write_text(page, encoding="utf-8")


def machine_line(machine: dict[str, Any]) -> str:
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{where}, {machine['date']}, load {machine['load_average']} at the start; torch {machine['torch']}, "
        f"timm {machine['timm']}, Python {machine['python']}.\n\ndiffrate_ext build: `{machine['diffrate_ext']}`"
    )


def operators_table(records: Sequence[Record]) -> str:
    """Times with quartiles, ratios to each rival in the same run, the floor, and peak memory, one line per case."""
    header = [
        "operator",
        "case",
        "diffrate_ext",
        "quartiles",
        "rivals: time / ours (quartiles)",
        "floor",
        "of floor",
        "peak memory ours / eager",
    ]
    rows = []
    for record in records:
        ours = record["seconds"]["diffrate_ext"]
        floor = record["floor"]
        rows.append(
            [
                record["operator"],
                record["case"],
                microseconds(ours["median"]),
                f"{microseconds(ours['low'])} - {microseconds(ours['high'])}",
                "<br>".join(
                    [f"{name}: {times(ratio)}" for name, ratio in record["ratio"].items()]
                    + [f"{name}: not available" for name in record["unavailable"]]
                ),
                f"{microseconds(floor['seconds'])} ({floor['limited_by']})",
                f"{ours['median'] / floor['seconds']:.1f}x",
                f"{mebibytes(record['peak_bytes']['diffrate_ext'])} / {mebibytes(record['peak_bytes']['eager'])}",
            ]
        )
    return "\n\n".join(part for part in (_table(header, rows), unavailable_list(records), bars_table(records)) if part)


def models_table(records: Sequence[Record]) -> str:
    """Images per second, speed-up over the uncompressed model and peak memory, one line per contender."""
    header = [
        "model",
        "batch",
        "contender",
        "images/s",
        "speed-up over uncompressed (quartiles)",
        "FLOPs ratio",
        "realised gain",
        "time / ours",
        "peak memory",
    ]
    rows = []
    for record in records:
        for name in record["seconds"]:
            compressed = not name.startswith("uncompressed")
            speed_up = record["speed_up"][name]
            rows.append(
                [
                    record["model"],
                    str(record["batch"]),
                    name,
                    f"{record['images_per_second'][name]:.1f}",
                    times(speed_up),
                    f"{record['flops_ratio']:.3f}" if compressed else "",
                    f"{speed_up['median'] / record['flops_ratio']:.3f}" if compressed else "",
                    times(record["ratio"][name]) if name in record["ratio"] else "",
                    mebibytes(record["peak_bytes"][name]),
                ]
            )
    return "\n\n".join(part for part in (_table(header, rows), unavailable_list(records), bars_table(records)) if part)


def search_table(records: Sequence[Record]) -> str:
    """Time and peak memory of a search step, one line per contender."""
    header = ["model", "batch", "contender", "time of a step", "quartiles", "time / ours (quartiles)", "peak memory"]
    rows = []
    for record in records:
        for name, seconds in record["seconds"].items():
            rows.append(
                [
                    record["model"],
                    str(record["batch"]),
                    name,
                    microseconds(seconds["median"]),
                    f"{microseconds(seconds['low'])} - {microseconds(seconds['high'])}",
                    times(record["ratio"][name]) if name in record["ratio"] else "",
                    mebibytes(record["peak_bytes"][name]),
                ]
            )
    return "\n\n".join(part for part in (_table(header, rows), bars_table(records)) if part)


def bars_table(records: Iterable[Record]) -> str:
    """Pass or miss of each bar; empty where no record has one."""
    rows = []
    for record in records:
        for bar in record["bars"]:
            case = record.get("operator", record.get("model")), record.get("case", f"batch {record.get('batch')}")
            if bar["rival"].endswith("peak memory"):
                needed, reached = f"at most 1/{bar['needed']:g}", f"1/{bar['reached']:.2f}"
            elif bar["needed"] < 1 and bar["rival"].startswith("copy"):
                needed, reached = f"at most {1 / bar['needed']:g}x its time", f"{1 / bar['reached']:.2f}x"
            else:
                needed, reached = f">= {bar['needed']:.4g}x as fast", f"{bar['reached']:.3f}x"
            verdict = "**pass**" if bar["met"] else "**MISS**"
            rows.append([*map(str, case), bar["kind"], bar["rival"], needed, reached, verdict])
    header = ["what", "case", "kind", "against", "needed", "reached", "verdict"]
    return _table(header, rows) if rows else ""


def unavailable_list(records: Iterable[Record]) -> str:
    """Which contenders this machine could not run, and why."""
    lines = sorted({f"- {name}: not available: {why}" for r in records for name, why in r["unavailable"].items()})
    return "\n".join(lines)


def index_page(directory: Path) -> str:
    """What was measured so far, on which machines."""
    lines = ["# Measured results", "", "Written by `benchmarks/run.py`; what each column means: `../README.md`.", ""]
    for path in sorted(directory.glob("*.json")):
        machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
        where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
        lines.append(f"- [{path.stem}]({path.stem}.md): {where}, {machine['date']}, torch {machine['torch']}")
    if not any(directory.glob("cpu_*.json")):
        lines.append("- CPU: not measured yet.")
    if not any(directory.glob("cuda_*.json")):
        lines.append("- CUDA: **not measured yet.** No figure of this project comes from a GPU so far.")
    return "\n".join(lines) + "\n"


def microseconds(seconds: float) -> str:
    """Three significant digits, in a unit that suits."""
    micro = seconds * 1e6
    if micro >= 10_000:
        return f"{micro / 1e3:.0f} ms" if micro >= 100_000 else f"{micro / 1e3:.1f} ms"
    digits = max(0, 2 - math.floor(math.log10(micro))) if micro > 0 else 0
    return f"{micro:.{digits}f} us"


def times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} - {ratio['high']:.2f})"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
