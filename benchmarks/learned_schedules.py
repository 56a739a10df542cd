"""Does a learned schedule lose less than a simple one of the same FLOPs? ``python benchmarks/learned_schedules.py``.

On the embedded model: rates are learned on the 1,000 embedded training images, once for each seed, and compared on all
10,000 test images of Fashion-MNIST, image by image, with the four simple schedules that a search may start from: the
first of them is the uniform one. Writes results/learned_schedules.*.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe
from report import machine_line
from torch import Tensor, nn

from diffrate_ext import Schedule, compressed_copy, embedded, flops
from diffrate_ext.embedded_search import search_embedded
from diffrate_ext.methods import DiffRate
from diffrate_ext.rate_search.start import simple_schedules

HERE = Path(__file__).resolve().parent
SIMPLE = (
    "uniform: same number, half pruned",
    "same number, all merged",
    "same share, half pruned",
    "same share, all merged",
)
sys.path.insert(0, str(HERE.parent / "scripts"))
from train_embedded import read_split  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="IDX files of Fashion-MNIST (default: where Debian's dataset-fashion-mnist puts them)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4], help="of the FLOPs")
    parser.add_argument("--steps", type=int, default=embedded.SEARCH_STEPS)
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""of the search, such as '{"flops_loss": "relative", "mask_gradient": "derivative", "start": "zeros"}'""",
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()

    images, labels = read_split(arguments.dataset, "t10k")
    model = embedded.load_model()
    uncompressed = Outcome(model, images, labels)
    content: dict[str, Any] = {
        "machine": describe(torch.device("cpu")),
        "images": len(labels),
        "steps": arguments.steps,
        "settings": arguments.settings,
        "uncompressed": uncompressed.summary(),
        "records": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "learned_schedules.json"
    for share in arguments.shares:
        gflops = share * flops(model) / 1e9
        simple = [
            Outcome(compressed_copy(model, one), images, labels) for one in simple_schedules(model, gflops, DiffRate())
        ]
        best = min(simple, key=lambda outcome: float(outcome.losses.mean()))
        record = {"share": share, "simple": [one.summary(uncompressed) for one in simple], "learned": []}
        content["records"].append(record)
        for seed in range(arguments.seeds):
            print(f"{share:.0%} of the FLOPs, seed {seed}", file=sys.stderr, flush=True)
            found = search_embedded(gflops, seed=seed, steps=arguments.steps, **arguments.settings)
            learned = Outcome(compressed_copy(model, found.schedule), images, labels)
            record["learned"].append(
                {
                    "seed": seed,
                    "searched_share": found.searched_gflops / found.target_gflops,
                    "schedule": schedule_summary(found.schedule, model),
                    **learned.summary(uncompressed),
                    "minus_uniform": differences(learned, simple[0], uncompressed),
                    "minus_best_simple": differences(learned, best, uncompressed),
                }
            )
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    return 0


class Outcome:
    """What a model makes of each test image."""

    @torch.inference_mode()
    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        logits = torch.cat([model(embedded.normalize(chunk)) for chunk in images.split(100)])
        self.losses = F.cross_entropy(logits, labels, reduction="none").double()
        self.predictions = logits.argmax(1)
        self.hits = (self.predictions == labels).double()

    def agrees(self, other: Outcome) -> Tensor:
        return (self.predictions == other.predictions).double()

    def summary(self, uncompressed: Outcome | None = None) -> dict[str, float]:
        result = {"loss": float(self.losses.mean()), "top1": float(self.hits.mean())}
        return result if uncompressed is None else result | {"agreement": float(self.agrees(uncompressed).mean())}


def schedule_summary(schedule: Schedule, model: nn.Module) -> dict[str, Any]:
    return {
        "gflops": flops(model, schedule) / 1e9,
        "after_pruning": schedule.after_pruning,
        "after_merging": schedule.after_merging,
    }


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """The mean difference over the images, and its 95 % interval: the same images, so that their spread cancels."""
    difference = ours - theirs
    mean, half = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def differences(ours: Outcome, theirs: Outcome, uncompressed: Outcome) -> dict[str, dict[str, float]]:
    return {
        "loss": paired(ours.losses, theirs.losses),
        "top1": paired(ours.hits, theirs.hits),
        "agreement": paired(ours.agrees(uncompressed), theirs.agrees(uncompressed)),
    }


def page(content: dict[str, Any]) -> str:
    base, settings = content["uncompressed"], content["settings"]
    lines = [
        machine_line(content["machine"]),
        "",
        f"{content['images']:,} test images, {content['steps']} steps of search"
        f"{f' with {json.dumps(settings)}' if settings else ''}; uncompressed: loss {base['loss']:.4f}, top-1 "
        f"{base['top1']:.2%}. Differences with 95 % intervals over the images. The best simple schedule is that of the "
        "least loss on these very images, which is more than a search knows.",
    ]
    for record in content["records"]:
        lines += [
            "",
            f"At {record['share']:.0%} of the FLOPs:",
            "",
            "| schedule | loss | top-1 | agreement | to uniform: loss | top-1 | to the best simple one: loss |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, found in zip(SIMPLE, record["simple"], strict=False):
            lines.append(f"| {name} | {_numbers(found)} | | | |")
        for found in record["learned"]:
            uniform, best = found["minus_uniform"], found["minus_best_simple"]
            points = {key: 100 * value for key, value in uniform["top1"].items()}
            cells = [
                f"learned, seed {found['seed']}",
                _numbers(found),
                "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**uniform["loss"]),
                "{mean:+.2f} ({low:+.2f} to {high:+.2f}) points".format(**points),
                "{mean:+.4f} ({low:+.4f} to {high:+.4f})".format(**best["loss"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _numbers(found: dict[str, float]) -> str:
    return f"{found['loss']:.4f} | {found['top1']:.2%} | {found['agreement']:.2%}"


if __name__ == "__main__":
    sys.exit(main())
