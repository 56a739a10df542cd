"""``diffrate search``: learn schedules for a model from images."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..embedded import SEARCH_SHARE, SEARCH_STEPS
from ..errors import InputValueError
from .common import add_model_options, check_embedded_options, consoles, device_named, model_named, warnings_on
from .costs import TRUSTED, add_time_options, costs_named, measured_by, same_machine
from .held_out import add_held_out_option, compare_with_uniform, hold_out
from .parsing import UsageError, add_command, amount, gflops_target, not_negative, positive
from .training import (
    SMOOTHING,
    add_batch_options,
    add_data_options,
    add_image_folder_options,
    add_output_options,
    add_run_options,
    choose,
    data_fingerprint,
    loading_named,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..cost_table import CostTable
    from ..images.sources import ImageSource
    from ..rate_search.loop import SearchResult
    from ..rate_search.settings import SearchSettings
    from ..timing import Benchmark
    from ..training.processes import Processes
    from ..training.records import Measure

STEPS = 1000


def add_search_command(commands: Any) -> None:
    """Add ``search`` to the commands of a parser."""
    parser = add_command(
        commands,
        "search",
        help="learn a schedule for a model from images",
        description="Learns how many tokens each block of a model may prune and merge at a given cost. Without "
        "arguments: for the embedded model, on the embedded training images. A search that was stopped goes on with "
        "--resume; so does a finished one, with more --steps. Several processes or machines: "
        "torchrun --nproc_per_node N -m diffrate_ext search ...",
        examples=[
            "diffrate search",
            "diffrate search --model deit_small_patch16_224 --images imagenet/ --gflops 60%",
            "diffrate search --model deit_small_patch16_224 --images imagenet/ --gflops 60% --steps 2000 --resume",
        ],
    )
    add_model_options(parser)
    add_image_folder_options(parser, "--soft-targets")
    parser.add_argument(
        "--gflops",
        type=gflops_target,
        nargs="+",
        metavar="G",
        help="the target, or several for one search each, in GFLOPs or as shares of the model's such as 60%% "
        f"(default: {100 * SEARCH_SHARE:.0f}%%)",
    )
    add_time_options(parser)
    add_held_out_option(parser)
    add_output_options(parser, "diffrate_search", "schedule, history, plot", "search")

    training = parser.add_argument_group("training")
    add_batch_options(training, STEPS, SEARCH_STEPS)
    training.add_argument(
        "--lr", type=amount, help="first learning rate (default: such that those of all steps add up to 20, capped)"
    )
    training.add_argument("--min-lr", type=amount, metavar="LR", help="last learning rate (default: a tenth of --lr)")
    training.add_argument("--weight-decay", type=amount, default=0.0, metavar="W", help="of AdamW (default: 0)")
    training.add_argument(
        "--flops-loss",
        choices=("none", "relative", "absolute"),
        default="none",
        help="none: the rates are held at the target; else, as in the paper, a term in the loss draws them there: "
        "relative to the model's FLOPs, or absolute, in GFLOPs (default: none)",
    )
    training.add_argument("--flops-weight", type=amount, metavar="W", help="of the FLOPs in the loss (default: 5)")
    training.add_argument(
        "--warmup-steps", type=not_negative, default=0, metavar="N", help="first steps without FLOPs loss (default: 0)"
    )
    training.add_argument(
        "--mask-gradient",
        choices=("difference", "derivative"),
        default="difference",
        help="what a masked token is worth: what would change if it were there, or the derivative where it is not, as "
        "in the paper (default: difference)",
    )
    training.add_argument(
        "--soft-targets",
        action=argparse.BooleanOptionalAction,
        help="learn what the uncompressed model says: needs no labels (default: no; embedded model, and models without "
        "classes such as DINOv2, whose features are kept: yes)",
    )
    training.add_argument(
        "--method",
        default="diffrate",
        metavar="NAME",
        help="what the schedule is for: diffrate or tome, with options such as diffrate:operations=merge "
        "(default: diffrate)",
    )
    training.add_argument(
        "--start",
        choices=("best", "uniform", "zeros"),
        default="best",
        help="first rates: the best of four simple schedules on the first batches, the uniform schedule, or all logits "
        "0, as in the paper (default: best)",
    )
    training.add_argument(
        "--granularity", type=positive, default=1, metavar="N", help="step of the kept numbers, in patches (default: 1)"
    )
    training.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, bfloat16 (default: on CUDA, where it halves the time of a step)",
    )
    training.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay the step from a CUDA graph: the same result, faster where the host is slow to launch it, for more "
        "memory (one process; default: no)",
    )

    add_data_options(parser, f"(default: {SMOOTHING}; embedded or soft targets: 0)")

    run = add_run_options(parser)
    run.add_argument("--tensorboard", action="store_true", help="log to FOLDER/tensorboard")
    parser.set_defaults(command=_search)


@dataclass(frozen=True)
class _Job:
    """What all searches of one call share."""

    model: Any
    images: ImageSource
    held_out: ImageSource | None
    settings: SearchSettings
    processes: Processes
    loading: dict[str, Any]
    remarks: Console
    costs: CostTable | None
    """Where targets are of time."""


@dataclass(frozen=True)
class _Target:
    """One of the targets of a call."""

    value: float
    """In GFLOPs, or in milliseconds of a batch."""
    words: str
    """As it was named."""
    folder: Path


def _search(arguments: argparse.Namespace) -> None:
    from ..training.processes import Processes, joined

    check_embedded_options(arguments)
    with joined(device_named(arguments)) as device:
        processes = Processes.current()
        results, remarks = consoles(quiet=not processes.first)
        with warnings_on(remarks):
            job = _job(arguments, device, processes, remarks)
            targets = _targets(arguments, job)
            found = [_search_one(arguments, job, target) for target in targets]
            speeds = _measured(job, found)
            for result, target, speed in zip(found, targets, speeds, strict=True):
                results.print(_summary(result, target, job, speed), soft_wrap=True, markup=False)
            if job.held_out is not None and processes.first:
                for line in _comparison(arguments, job, found):
                    results.print(line, soft_wrap=True, markup=False)


def _job(arguments: argparse.Namespace, device: torch.device, processes: Processes, remarks: Console) -> _Job:
    import torch

    from ..answers import has_classes, number_of_classes
    from ..images.sources import match_classes, open_images

    if arguments.model is not None and arguments.images is None:
        raise UsageError("--model needs --images FOLDER to learn from")
    _check_tensorboard(arguments)

    settings = _settings(arguments, device)
    images = open_images(arguments.images, split=arguments.split)
    torch.manual_seed(arguments.seed)  # random weights are the same when the search is resumed
    model: Any = model_named(arguments)
    if not has_classes(model):
        if arguments.soft_targets is False:
            raise UsageError("--no-soft-targets: the model has no classes, so labels say nothing about it")
        settings = replace(settings, soft_targets=True)
    if not images.labelled and not settings.soft_targets:
        raise UsageError(
            f"{images.where} has no labels ({images.why_unlabelled}): add --soft-targets, to learn from what the "
            "uncompressed model says"
        )
    if images.labelled and not settings.soft_targets:
        try:
            images = match_classes(images, number_of_classes(model))
        except InputValueError as error:
            raise UsageError(f"{error}; with --soft-targets labels are not needed") from error
    if not images.labelled or settings.soft_targets:
        from ..images.sources import without_labels

        images = without_labels(images)
    if arguments.no_pretrained:
        remarks.print("Random weights: what is searched for is real, what is found says nothing.")
    loading = loading_named(
        arguments, 0.0 if settings.soft_targets else choose(arguments, "label_smoothing", SMOOTHING, 0.0)
    )
    images, held_out = hold_out(arguments, images, model, remarks)
    model = model.to(device)
    return _Job(model, images, held_out, settings, processes, loading, remarks, costs_named(arguments, model))


def _settings(arguments: argparse.Namespace, device: torch.device) -> SearchSettings:
    from ..rate_search.settings import SearchSettings

    return SearchSettings(
        steps=choose(arguments, "steps", STEPS, SEARCH_STEPS),
        lr=arguments.lr,
        min_lr=arguments.min_lr,
        weight_decay=arguments.weight_decay,
        flops_weight=arguments.flops_weight,
        flops_loss=arguments.flops_loss,
        warmup_steps=arguments.warmup_steps,
        mask_gradient=arguments.mask_gradient,
        soft_targets=choose(arguments, "soft_targets", False, True),
        amp=device.type == "cuda" if arguments.amp is None else arguments.amp,
        cuda_graph=arguments.cuda_graph,
        start=arguments.start,
        granularity=arguments.granularity,
        seed=arguments.seed,
        method=arguments.method,
    )


def _check_tensorboard(arguments: argparse.Namespace) -> None:
    if arguments.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard") from None


def _targets(arguments: argparse.Namespace, job: _Job) -> list[_Target]:
    """All are checked before the first search starts."""
    from ..compression.costing import costing_of
    from ..rate_search.checkpoints import SearchFolder
    from ..rate_search.loop import check_target

    costing = costing_of(job.model, job.costs)
    if job.costs is None:
        wanted = arguments.gflops or [f"{SEARCH_SHARE:.0%}"]
        values = [round(costing.target(one), 4) if isinstance(one, str) else one for one in wanted]
        words = [f"{value:g} GFLOPs" for value in values]
        names = [f"{value:g}G" for value in values]
    else:
        values = [costing.target(speedup=one) for one in arguments.speedup or []]
        values += [costing.target(latency=one) for one in arguments.latency or []]
        words = [f"{costing.uncompressed / value:.3g}x" for value in values]
        names = words
    if len(set(names)) < len(names):
        raise UsageError(f"{'--speedup' if job.costs else '--gflops'} names a target twice: {' '.join(words)}")
    for value in values:
        check_target(job.model, value, job.settings.granularity, method=job.settings.method, costs=job.costs)
    several = len(values) > 1
    folders = [arguments.output / name if several else arguments.output for name in names]
    if job.processes.first:
        for folder in folders:
            SearchFolder(folder).check(resume=arguments.resume)
            if arguments.resume and not SearchFolder(folder).checkpoint.exists():
                job.remarks.print(f"{folder} holds no search yet: starting one", soft_wrap=True, markup=False)
    return [_Target(*parts) for parts in zip(values, words, folders, strict=True)]


def _search_one(arguments: argparse.Namespace, job: _Job, target: _Target) -> SearchResult:
    from ..answers import has_classes
    from ..compression.costing import costing_of
    from ..rate_search.loop import search
    from ..rate_search.report import all_reports, progress_report, tensorboard_report
    from ..training.data import training_loader

    settings, processes = job.settings, job.processes
    place: dict[str, Any] = {"rank": processes.rank, "world": processes.world}

    def loader(start: int) -> Any:
        run: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed, "start": start}
        return training_loader(job.images, job.model, **job.loading, **run, **place)

    measure: Measure = "accuracy" if job.images.labelled else "agreement" if has_classes(job.model) else "cosine"
    costing = costing_of(job.model, job.costs)
    unit = costing.unit
    with ExitStack() as stack:
        words = f"{target.value:.4g} {unit}"
        progress = progress_report(job.remarks, target.words, settings.steps, words, unit=unit, measure=measure)
        reports = [stack.enter_context(progress)]
        if arguments.tensorboard:
            reports.append(stack.enter_context(tensorboard_report(target.folder / "tensorboard", unit)))
        return search(
            job.model,
            loader,
            settings=settings,
            **costing.options(target.value),
            output=target.folder,
            resume=arguments.resume,
            report=all_reports(reports),
            fingerprint=data_fingerprint(job.images, job.loading, processes),
        )


def _comparison(arguments: argparse.Namespace, job: _Job, found: list[SearchResult]) -> list[str]:
    from ..images.loading import evaluation_loader

    assert job.held_out is not None
    workers = job.loading["workers"]
    loader = evaluation_loader(job.held_out, job.model, batch_size=arguments.batch_size, workers=workers)
    return compare_with_uniform(job.model, found, loader, job.held_out.where, job.remarks, job.costs)


def _measured(job: _Job, found: list[SearchResult]) -> list[Benchmark | None]:
    """What the schedules of targets of time take in truth, if this is the machine of the cost table."""
    if job.costs is None or not job.processes.first:
        return [None] * len(found)
    if not same_machine(job.model, job.costs):
        place = f"{job.costs.device}, {job.costs.threads} threads"
        job.remarks.print(f"Not measured here: the costs are of {place}", soft_wrap=True, markup=False)
        return [None] * len(found)
    return [*measured_by(job.costs, job.model, [result.schedule for result in found])]


def _summary(result: SearchResult, target: _Target, job: _Job, speed: Benchmark | None) -> str:
    from ..compression.costing import costing_of
    from ..rate_search.checkpoints import SearchFolder

    off = result.cost / result.target - 1
    if abs(off) <= 0.01:
        verdict = f"{abs(off):.2%} from the target"
    else:
        verdict = f"{abs(off):.1%} from the target: steps of {job.settings.granularity} patches come no nearer"
    before = ""
    if result.steps_before == job.settings.steps:
        before = "was finished before: "
    elif result.steps_before:
        before = f"resumed after step {result.steps_before}: "
    if result.unit == "GFLOPs":
        found = f"the search ended at {result.searched:.4g}, the schedule takes {result.cost:.4g} ({verdict})"
    else:
        found = (
            f"the search ended at {result.searched:.4g} ms for a batch, the schedule is to take {result.cost:.4g} "
            f"({verdict}), {result.gflops:.4g} GFLOPs"
        )
    if speed is not None:
        assert job.costs is not None
        promised = costing_of(job.model, job.costs).uncompressed / result.cost
        found += f"\n  measured: {1e3 * speed.seconds:.4g} ms, {speed.speed_up:.2f}x ±{speed.speed_up_spread:.2f}"
        if abs(speed.speed_up / promised - 1) > TRUSTED:
            found += f", for {promised:.2f}x by the table: profile again, and see what its check says"
    files = SearchFolder(target.folder)
    return f"{target.words}, {before}{found}\n  {files.schedule}\n  {files.plot}"
