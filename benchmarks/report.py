"""Results as JSON, and Markdown pages made from it.

``python benchmarks/report.py [FOLDER]`` makes those of a folder, or of results/, anew.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrate_ext.paired import Interval

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"

ON_A_GPU = {
    "cuda_test": "`gpu.sh test`: every operator against the reference, its gradients, under `torch.compile`; whole "
    "models against the authors' results",
    "cuda_memcheck": "`gpu.sh sanitize`: no bad memory access in any kernel, by compute-sanitizer's memcheck",
    "cuda_racecheck": "`gpu.sh sanitize`: no race in any kernel, by its racecheck",
    "cuda_synccheck": "`gpu.sh sanitize`: no misused barrier in any kernel, by its synccheck",
    "cuda_ops_bfloat16": "`gpu.sh operators`: `prune_merge` in at most twice the time that its kept tokens take in and "
    "out of memory, and 10 times as fast as eager; `proportional_attention` in at most 1.10 of fused attention's time; "
    "`masked_attention` 3 times as fast as eager in a third of its memory; the bandwidth that the others reach",
    "cuda_ops": "`gpu.sh operators`: the operators of the search step in float32",
    "cuda_models_bfloat16": "`gpu.sh models`: realised gains of 1.05 (aim: 1.15) of DeiT-S 2.9 G, DeiT-B 11.5 G, "
    "ViT-L 42.3 G and ViT-H 103.4 G at batch 256, of 1.0 where torch.compile compiles both; at batch 1 and 32 no "
    "slower than uncompressed as CUDA graphs, at batch 1 at most 15 % slower without",
    "cuda_models": "`gpu.sh models`: DeiT-S in float32",
    "cuda_tune_attention": "`gpu.sh tune`: every variant of the attention kernel for short sequences",
    "cuda_tune_prune_merge": "`gpu.sh tune`: every plan of `prune_merge`",
    "cuda_search": "`gpu.sh search`: the search step, and its capture in a CUDA graph",
}
"""What only a GPU can tell, by the page that says it. Pages without a JSON file sum up in their first line."""


class Results:
    """One JSON file of records, rewritten after each so that an interrupted run can go on where it stopped.

    What failed is listed beside the records. A resumed run tries it again, unless it is a ``restart`` of the same run.
    It starts anew where the records are of another commit.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, resume: bool, restart: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine, "records": [], "failures": []}
        if resume and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["machine"].get("commit") == machine.get("commit"):
                self.content["records"] = found["records"]
                self.content["failures"] = found.get("failures", []) if restart else []
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def records(self) -> list[Record]:
        return self.content["records"]

    @property
    def failures(self) -> list[Record]:
        return self.content["failures"]

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether it was run, well or not."""
        return any(
            all(record.get(name) == value for name, value in key.items()) for record in (*self.records, *self.failures)
        )

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.write()

    def fail(self, key: Mapping[str, Any], reason: str) -> None:
        self.failures.append({**key, "reason": reason})
        self.write()

    def write(self) -> None:
        """The JSON, and its page."""
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(page(self.path, self.content), encoding="utf-8")


def page(path: Path, content: dict[str, Any]) -> str:
    """The Markdown page of a results file: its name says what it holds."""
    tables = {
        "ops": operators_table,
        "models": models_table,
        "search": search_table,
        "families": families_table,
        "equal_time": equal_time_table,
    }
    parts = [
        machine_line(content["machine"]),
        *(f"**Failed**: {', '.join(map(str, failure.values()))}" for failure in content.get("failures", [])),
        tables[path.stem.partition("_")[2].removesuffix("_bfloat16")](content["records"]),
    ]
    return "\n\n".join(parts) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    build = f"diffrate_ext build: `{machine['diffrate_ext']}`"
    return (
        f"{where(machine)}, {machine['date']}, load {machine['load_average']} at the start; torch {machine['torch']}, "
        f"timm {machine['timm']}, Python {machine['python']}{at_commit(machine)}.\n\n"
        + "\n\n".join(part for part in (build, machine.get("remark")) if part)
    )


def where(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def at_commit(machine: Mapping[str, Any]) -> str:
    return f", commit {machine['commit']}" if machine.get("commit") else ""


def operators_table(records: Sequence[Record]) -> str:
    """Times with quartiles, ratios to each rival in the same run, the floor, and peak memory, one line per case.

    Where a case was run as a CUDA graph too, that time is held against the floor: the kernels' own.
    """
    header = [
        "operator",
        "case",
        "diffrate_ext",
        "quartiles",
        "rivals: time / ours (quartiles)",
        "floor",
        "time / floor",
        "of the measured rate",
        "peak memory ours / eager",
    ]
    rows = []
    for record in records:
        ours = record["seconds"]["diffrate_ext"]
        graph = record["seconds"].get("diffrate_ext, CUDA graph")
        floor = record["floor"]
        share = floor["seconds"] / (graph or ours)["median"]
        rows.append(
            [
                record["operator"],
                record["case"],
                microseconds(ours["median"]) + (f"<br>CUDA graph: {microseconds(graph['median'])}" if graph else ""),
                quartiles(ours) + (f"<br>{quartiles(graph)}" if graph else ""),
                "<br>".join(
                    [f"{name}: {times(ratio)}" for name, ratio in record["ratio"].items()]
                    + [f"{name}: not available" for name in record["unavailable"]]
                ),
                f"{microseconds(floor['seconds'])} ({amount(floor)})",
                f"{1 / share:.1f}x",
                f"{share:.0%} of {rate(floor)}",
                f"{mebibytes(record['peak_bytes']['diffrate_ext'])} / {mebibytes(record['peak_bytes']['eager'])}",
            ]
        )
    return "\n\n".join(part for part in (_table(header, rows), unavailable_list(records), bars_table(records)) if part)


def models_table(records: Sequence[Record]) -> str:
    """Images per second, speed-up over the uncompressed model and peak memory, one line per contender."""
    header = [
        "model",
        "batch",
        "run",
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
            compressed = name != "uncompressed"
            speed_up = record["speed_up"].get(name)
            rows.append(
                [
                    record["model"],
                    str(record["batch"]),
                    record["way"],
                    name,
                    f"{record['images_per_second'][name]:.1f}",
                    times(speed_up) if speed_up else "",
                    f"{record['flops_ratio']:.3f}" if compressed else "",
                    f"{speed_up['median'] / record['flops_ratio']:.3f}" if compressed and speed_up else "",
                    times(record["ratio"][name]) if name in record["ratio"] else "",
                    mebibytes(record["peak_bytes"][name]) if name in record["peak_bytes"] else "",
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
                    quartiles(seconds),
                    times(record["ratio"][name]) if name in record["ratio"] else "",
                    mebibytes(record["peak_bytes"][name]) if name in record["peak_bytes"] else "",
                ]
            )
    return "\n\n".join(part for part in (_table(header, rows), unavailable_list(records), bars_table(records)) if part)


def families_table(records: Sequence[Record]) -> str:
    """FLOPs, tokens and speed-up of one model of each family; of the trained ones also what each method keeps."""
    header = ["family", "model", "image", "batch", "GFLOPs", "tokens", "FLOPs ratio", "speed-up (quartiles)"]
    rows = [
        [
            record["family"],
            record["model"],
            f"{record['image_size']} px",
            str(record["batch"]),
            f"{record['uncompressed_gflops']:.3g} → {record['gflops']:.3g}",
            f"{record['tokens']} → {record['tokens_left']}",
            f"{record['uncompressed_gflops'] / record['gflops']:.2f}",
            times(record["speed_up"]),
        ]
        for record in records
    ]
    return "\n\n".join(part for part in (_table(header, rows), kept_table(records)) if part)


def kept_table(records: Sequence[Record]) -> str:
    """What trained models keep of their answers; empty where none was judged."""
    judged = [record for record in records if "kept" in record]
    if not judged:
        return ""
    methods = list(judged[0]["kept"]["methods"])
    rows = []
    for record in judged:
        kept = record["kept"]
        shown = [kept["methods"][method] for method in methods]
        form = ".1%" if kept["measure"] == "same class" else ".3f"
        rows.append(
            [record["model"], record["share"], f"{kept['pictures']}: {kept['of']}", kept["measure"]]
            + [format(value, form) for value in shown]
        )
    return _table(["model", "FLOPs", "pictures", "what is kept", *methods], rows)


def equal_time_table(records: Sequence[Record]) -> str:
    """Of each model and share whether a search for time loses less than one for FLOPs, then every schedule."""
    first = ["model", "FLOPs", "time, for time / for FLOPs (quartiles)", "pictures", "measure"]
    first += ["error, for FLOPs", "for time", "difference (95 %)", "verdict"]
    rows, schedules = [], []
    for record in records:
        mean = {
            kind: sum(row["error"] for row in record["rows"] if row["searched"] == kind) * 2 / len(record["rows"])
            for kind in ("for FLOPs", "for time")
        }
        difference = record["difference"]
        rows.append(
            [
                record["title"],
                record["share"],
                times(record["time_ratio"]),
                str(record["pictures"]),
                record["measure"],
                *(f"{error:.4f}" for error in mean.values()),
                f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})",
                Interval(**difference).verdict,
            ]
        )
        schedules += [
            [
                record["model"],
                record["share"],
                row["searched"],
                str(row["seed"]),
                f"{row['gflops_share']:.1%}",
                f"{row['predicted_speed_up']:.2f}x",
                f"{row['speed_up']:.2f}x",
                f"{row['error']:.4f}",
                " ".join(map(str, row["kept"][1])),
            ]
            for row in record["rows"]
        ]
    second = ["model", "aim", "searched", "seed", "FLOPs", "speed-up by the table", "measured", "error"]
    return f"{_table(first, rows)}\n\n{_table([*second, 'tokens after each block'], schedules)}"


def bars_table(records: Iterable[Record]) -> str:
    """Pass or miss of each bar; empty where no record has one."""
    rows = []
    for record in records:
        for bar in record["bars"]:
            case = record.get("operator", record.get("model")), record.get("case", f"batch {record.get('batch')}")
            if record.get("way", "plain") != "plain":
                case = case[0], f"{case[1]}, {record['way']}"
            if not bar["reached"]:
                needed, reached = f"{bar['needed']:.4g}", "not measured"
            elif bar["rival"].endswith("peak memory"):
                needed, reached = f"at most 1/{bar['needed']:g}", f"1/{bar['reached']:.2f}"
            elif bar["needed"] < 1:
                needed, reached = f"at most {1 / bar['needed']:g}x its time", f"{1 / bar['reached']:.2f}x"
            else:
                needed, reached = f">= {bar['needed']:.4g}x as fast", f"{bar['reached']:.3f}x"
            verdict = "**pass**" if bar["met"] else "**MISS**"
            rows.append([*map(str, case), bar["kind"], bar["rival"], needed, reached, verdict])
    header = ["what", "case", "kind", "against", "needed", "reached", "verdict"]
    return _table(header, rows) if rows else ""


def unavailable_list(records: Iterable[Record]) -> str:
    """Which contenders this machine could not run, and why."""
    lines = sorted(
        {f"- {name}: not available: {why}" for r in records for name, why in r.get("unavailable", {}).items()}
    )
    return "\n".join(lines)


def index_page(directory: Path) -> str:
    """What was measured so far, on which machines."""
    lines = [
        "# Measured results",
        "",
        "Written by `benchmarks/run.py` and `gpu.sh`; what each column means: `../README.md`.",
        "",
    ]
    for path in sorted(directory.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        machine, bars = content["machine"], [bar for record in content["records"] for bar in record.get("bars", ())]
        when = f"{machine['date']}, torch {machine['torch']}{at_commit(machine)}"
        reached = f"; {sum(bar['met'] for bar in bars)} of {len(bars)} bars and aims reached" if bars else ""
        lines.append(f"- [{path.stem}]({path.stem}.md): {where(machine)}, {when}{reached}")
    evidence = directory / "paper" / "results.json"
    if evidence.exists():
        machine = json.loads(evidence.read_text(encoding="utf-8"))["machine"]
        when = f"{machine['date']}, torch {machine['torch']}{at_commit(machine)}"
        lines.append(f"- [paper](paper/README.md): methods and schedules side by side; {where(machine)}, {when}")
    dense = directory / "dense_features.md"
    if dense.exists():
        lines.append(f"- [{dense.stem}]({dense.name}): {dense.read_text(encoding='utf-8').splitlines()[0]}")
    if not any(directory.glob("cpu_*.json")):
        lines.append("- CPU: not measured yet.")
    there = {name for name in ON_A_GPU if (directory / f"{name}.md").exists()}
    for name in ON_A_GPU:
        if name in there and not (directory / f"{name}.json").exists():
            summary, *_ = (directory / f"{name}.md").read_text(encoding="utf-8").splitlines()
            lines.append(f"- [{name}]({name}.md): {summary}")
    if not there:
        lines += [
            "",
            "## **Not yet run on a GPU**",
            "",
            "No figure of this project comes from a GPU so far. The CUDA kernels were compiled, and an emulation ran",
            "their sources on the CPU, which is evidence of their logic and never of their speed.",
        ]
    if len(there) < len(ON_A_GPU):
        lines += ["", "Unverified until it has run on a GPU:", ""]
        lines += [f"- {what}" for name, what in ON_A_GPU.items() if name not in there]
    return "\n".join(lines) + "\n"


def rewrite(directory: Path) -> None:
    """All pages of a folder of results, from its JSON files; the index last."""
    for path in directory.glob("*.json"):
        if path.stem.startswith(("cpu_", "cuda_")):
            content = json.loads(path.read_text(encoding="utf-8"))
            path.with_suffix(".md").write_text(page(path, content), encoding="utf-8")
    (directory / "README.md").write_text(index_page(directory), encoding="utf-8")


def quartiles(spread: Mapping[str, float]) -> str:
    return f"{microseconds(spread['low'])} - {microseconds(spread['high'])}"


def amount(floor: Mapping[str, Any]) -> str:
    """What a call has to do at least, of what it takes longest for."""
    if floor["limited_by"] == "memory":
        return f"{floor['bytes'] / 1e6:.3g} MB"
    return f"{floor['operations'] / 1e9:.3g} GFLOP"


def rate(floor: Mapping[str, Any]) -> str:
    if floor["limited_by"] == "memory":
        return f"{floor['bandwidth'] / 1e9:.0f} GB/s"
    return f"{floor['rate'] / 1e9:.0f} GFLOP/s"


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


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
