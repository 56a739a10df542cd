"""``diffrate finetune``: train a model's weights under a schedule."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputValueError
from .common import (
    add_any_model_option,
    add_method_option,
    add_model_options,
    check_embedded_options,
    consoles,
    device_named,
    model_named,
    schedules_in,
    warnings_on,
)
from .parsing import UsageError, add_command, amount, gflops_target, not_negative
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
    from torch import nn

    from ..evaluation import Batch
    from ..finetuning.loop import FinetuneResult
    from ..finetuning.settings import FinetuneSettings
    from ..images.loading import ImageLoader
    from ..images.sources import ImageSource
    from ..schedule import Schedule
    from ..training.records import Measure

STEPS, LR = 1000, 2e-5
OUR_STEPS, OUR_LR, OUR_SHARE = 50, 8e-4, 0.5
"""For the embedded model, small and with few images; and the share of its FLOPs."""


def add_finetune_command(commands: Any) -> None:
    """Add ``finetune`` to the commands of a parser."""
    parser = add_command(
        commands,
        "finetune",
        help="train a model's weights under a schedule, to win back accuracy",
        description="Trains the weights of a compressed model, by the paper's recipe, and says what that did to its "
        "accuracy on images that it did not train on. Without arguments: the embedded model, on the embedded training "
        "images. Several processes or machines: torchrun --nproc_per_node N -m diffrate_ext finetune ...",
        examples=[
            "diffrate finetune",
            "diffrate finetune --model deit_small_patch16_224 --images imagenet/ --schedule found/schedule.json",
        ],
    )
    add_model_options(parser)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--schedule", type=Path, metavar="FILE", help="a schedule as a search leaves it")
    choice.add_argument(
        "--gflops",
        type=gflops_target,
        metavar="G",
        help="or a uniform one of so many GFLOPs, or of a share of the model's such as 60%% (embedded: "
        f"{100 * OUR_SHARE:.0f}%%)",
    )
    add_method_option(parser)
    add_any_model_option(parser)
    add_image_folder_options(parser, "--distill 1")
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="FOLDER",
        help="images to evaluate on, before and after (default: the validation part of --images, if it has one)",
    )
    add_output_options(parser, "diffrate_finetune", "weights, schedule, history", "run")

    training = parser.add_argument_group("training")
    add_batch_options(training, STEPS, OUR_STEPS)
    training.add_argument(
        "--lr",
        type=amount,
        help="largest learning rate, for 512 images in a step; for B it is B/512 of that "
        f"(default: {LR:g}; embedded: {OUR_LR:g})",
    )
    training.add_argument(
        "--min-lr",
        type=amount,
        metavar="LR",
        help="last learning rate, scaled alike (default: a twentieth of --lr)",
    )
    training.add_argument(
        "--warmup-steps", type=not_negative, metavar="N", help="steps in which it rises (default: a twentieth)"
    )
    training.add_argument("--weight-decay", type=amount, default=0.05, metavar="W", help="of AdamW (default: 0.05)")
    training.add_argument("--drop-path", type=amount, default=0.1, metavar="P", help="of the last block (default: 0.1)")
    training.add_argument(
        "--distill",
        type=amount,
        metavar="W",
        help="weight of what the uncompressed model says, from 0 to 1, against the labels'; with 1 images need none "
        "(default: 0; models without classes, whose features are kept: 1)",
    )
    training.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, bfloat16 (default: on CUDA)",
    )
    add_data_options(parser, f"share of the labels for all classes (default: {SMOOTHING})")
    add_run_options(parser)
    parser.set_defaults(command=_finetune)


def _finetune(arguments: argparse.Namespace) -> None:
    from ..training.processes import Processes, joined

    check_embedded_options(arguments)
    if arguments.model is not None and arguments.images is None:
        raise UsageError("--model needs --images FOLDER to learn from")
    if arguments.model is not None and arguments.schedule is None and arguments.gflops is None:
        raise UsageError("--model needs --schedule FILE or --gflops G: what the model is to be fine-tuned for")
    with joined(device_named(arguments)) as device:
        processes = Processes.current()
        results, remarks = consoles(quiet=not processes.first)
        with warnings_on(remarks):
            result = _run(arguments, device, remarks)
            results.print(_summary(result, arguments.output), soft_wrap=True, markup=False)
            if result.gain is not None and result.gain < 0:
                remarks.print(
                    "Fine-tuning made the model worse: do not use these weights. docs/finetune.md says what to try: "
                    "first a lower --lr, then --distill 1",
                    style="yellow",
                    soft_wrap=True,
                )


def _run(arguments: argparse.Namespace, device: torch.device, remarks: Console) -> FinetuneResult:
    import torch

    from ..answers import has_classes
    from ..finetuning.history import FinetuneFolder
    from ..finetuning.loop import finetune
    from ..images.sources import open_images
    from ..training.data import training_loader
    from ..training.processes import Processes
    from ..training.progress import RunningMeans, in_words, progress_of_steps

    processes = Processes.current()
    settings = _settings(arguments, device)
    images = open_images(arguments.images, split=arguments.split)
    torch.manual_seed(arguments.seed)  # random weights are the same when the run is resumed
    model: Any = model_named(arguments).to(device)
    if not has_classes(model):
        if arguments.distill not in (None, 1):
            raise UsageError(f"--distill {arguments.distill:g}: the model has no classes; only 1 keeps its features")
        settings = replace(settings, distill=1.0)
    images = _with_labels_that_count(images, model, settings)
    schedule = _schedule_named(arguments, model)
    folder = FinetuneFolder(arguments.output)
    if arguments.resume and not folder.checkpoint.exists():
        remarks.print(f"{folder.path} holds no fine-tuning yet: starting one", soft_wrap=True, markup=False)
    if arguments.no_pretrained:
        remarks.print("Random weights: the training is real, what it leads to says nothing.")
    loading = loading_named(arguments, smoothing=0.0)  # the loss smooths the labels
    place: dict[str, Any] = {"rank": processes.rank, "world": processes.world}

    def loader(start: int) -> Any:
        run: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed, "start": start}
        return training_loader(images, model, **loading, **run, **place)

    measure: Measure = "accuracy" if images.labelled else "agreement" if has_classes(model) else "cosine"
    means = RunningMeans(2)
    with progress_of_steps(remarks, "fine-tuning", settings.steps) as show:
        return finetune(
            model,
            schedule,
            loader,
            settings,
            validation=_validation(arguments, images, model, remarks),
            output=folder.path,
            resume=arguments.resume,
            report=lambda record: show(record.step, in_words(measure, *means(record.loss, record.accuracy))),
            fingerprint=data_fingerprint(images, loading, processes),
        )


def _settings(arguments: argparse.Namespace, device: torch.device) -> FinetuneSettings:
    from ..finetuning.settings import FinetuneSettings

    return FinetuneSettings(
        steps=choose(arguments, "steps", STEPS, OUR_STEPS),
        lr=choose(arguments, "lr", LR, OUR_LR),
        min_lr=arguments.min_lr,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        drop_path=arguments.drop_path,
        smoothing=SMOOTHING if arguments.label_smoothing is None else arguments.label_smoothing,
        distill=arguments.distill or 0.0,
        amp=device.type == "cuda" if arguments.amp is None else arguments.amp,
        seed=arguments.seed,
    )


def _with_labels_that_count(images: ImageSource, model: Any, settings: FinetuneSettings) -> ImageSource:
    """The images with the model's labels, or without where nobody asks for them."""
    from ..answers import number_of_classes
    from ..images.sources import match_classes, without_labels

    if settings.distill == 1:
        return without_labels(images)
    if not images.labelled:
        raise UsageError(
            f"{images.where} has no labels ({images.why_unlabelled}): add --distill 1, to learn from what the "
            "uncompressed model says"
        )
    try:
        return match_classes(images, number_of_classes(model))
    except InputValueError as error:
        raise UsageError(f"{error}; with --distill 1 labels are not needed") from error


def _schedule_named(arguments: argparse.Namespace, model: nn.Module) -> Schedule:
    from ..compression.uniform import uniform_schedule

    if arguments.schedule is not None:
        (named,) = schedules_in([arguments.schedule], model, any_model=arguments.any_model)
        return replace(named.schedule, method=arguments.method or named.schedule.method)
    gflops = f"{OUR_SHARE:.0%}" if arguments.gflops is None else arguments.gflops
    return uniform_schedule(model, gflops, method=arguments.method or "diffrate")


def _validation(
    arguments: argparse.Namespace, training: ImageSource, model: Any, remarks: Console
) -> _Announced | None:
    """The images to evaluate on; None where there are none that the training does not see."""
    from ..answers import has_classes, number_of_classes
    from ..images.loading import evaluation_loader
    from ..images.sources import match_classes, open_images, without_labels

    images = open_images(arguments.validation or arguments.images, purpose="evaluation")
    if images.where == training.where:
        remarks.print(
            f"{training.where} has no part for validation: whether the accuracy falls is not measured. Name images "
            "with --validation FOLDER",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
        return None
    if images.labelled and has_classes(model):
        try:
            images = match_classes(images, number_of_classes(model))
        except InputValueError as error:
            remarks.print(f"agreement only: {error}", style="yellow", markup=False, soft_wrap=True)
            images = without_labels(images)
    workers = loading_named(arguments, 0.0)["workers"]
    loader = evaluation_loader(images, model, batch_size=arguments.batch_size, workers=workers)
    return _Announced(loader, f"evaluating on {len(images):,} images of {images.where}", remarks)


class _Announced:
    """A loader that says so when it is read: an evaluation may take minutes."""

    def __init__(self, loader: ImageLoader, words: str, remarks: Console) -> None:
        self.loader, self.words, self.remarks = loader, words, remarks

    def __iter__(self) -> Iterator[Batch]:
        self.remarks.print(self.words, soft_wrap=True, markup=False)
        return iter(self.loader)


def _summary(result: FinetuneResult, output: Path) -> str:
    from ..finetuning.history import FinetuneFolder

    files = FinetuneFolder(output)
    resumed = ""
    if result.steps_before == result.history.steps:
        resumed = "was finished before: "
    elif result.steps_before:
        resumed = f"resumed after step {result.steps_before}: "
    if result.uncompressed is None or result.before is None or result.after is None:
        words = "fine-tuned"
    else:
        (name, before), (_, after), (_, whole) = (
            quality.measure for quality in (result.before, result.after, result.uncompressed)
        )
        rose = "rose" if after > before else "FELL" if after < before else "stayed"
        digits = ".4f" if name == "cosine" else ".2%"
        moved = f"at {after:{digits}}" if rose == "stayed" else f"from {before:{digits}} to {after:{digits}}"
        words = f"{name} {rose} {moved}, on {result.after.n:,} images"
        if name == "top-1":
            was, is_now = f"{result.before.agreement:.2%}", f"{result.after.agreement:.2%}"
            moved = f"stayed {was}" if was == is_now else f"went from {was} to {is_now}"
            words += f" (uncompressed: {whole:.2%}); agreement with it {moved}"
    return f"{resumed}{words}\n  {files.weights}\n  {files.schedule}"
