"""``diffrate train-predictors``: what DynamicViT needs to compress a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import (
    add_machine_options,
    add_model_options,
    check_embedded_options,
    consoles,
    default_workers,
    device_named,
    model_named,
    warnings_on,
)
from .parsing import UsageError, add_command, amount, gflops_target, not_negative, positive

SHARE = 0.5  # of the uncompressed model's FLOPs


def add_train_predictors_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "train-predictors",
        help="train what DynamicViT goes by when it drops a model's tokens",
        description="Trains DynamicViT's predictors by what the uncompressed model says of the images; labels are not "
        "needed, and the model stays as it is. Without --model: for the embedded one, on embedded training images.",
        examples=[
            "diffrate train-predictors",
            "diffrate train-predictors --model deit_small_patch16_224 --images photos/ --gflops 60%",
        ],
    )
    add_model_options(parser)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures, in sub-folders or not, or a saved Hugging Face dataset"
    )
    parser.add_argument(
        "--gflops", type=gflops_target, metavar="G", help=f"the target (default: {100 * SHARE:.0f}%% of the model's)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("diffrate_predictors.safetensors"),
        metavar="FILE",
        help="for the predictors (default: diffrate_predictors.safetensors)",
    )
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="batches (default: 300)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images in a batch (default: 64)")
    parser.add_argument("--lr", type=amount, help="first learning rate (default: as PredictorSettings has it)")
    add_machine_options(parser)
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="of all random choices (default: 0)")
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from .. import embedded
    from ..compression.targets import gflops_of
    from ..images.sources import open_images, without_labels
    from ..predictor_training import PredictorSettings, train_predictors
    from ..training.data import training_loader
    from ..training.progress import RunningMeans, progress_of_steps

    check_embedded_options(arguments)
    ours = arguments.model is None
    if not ours and arguments.images is None:
        raise UsageError("--model needs --images FOLDER to learn from")
    if not arguments.output.resolve().parent.is_dir():  # said before the training, not after it
        raise UsageError(f"--output: there is no folder {arguments.output.resolve().parent}")
    results, remarks = consoles()
    settings = PredictorSettings(
        steps=arguments.steps,
        seed=arguments.seed,
        **({} if arguments.lr is None else {"lr": arguments.lr}),
    )
    images = without_labels(open_images(arguments.images))
    torch.manual_seed(arguments.seed)  # of random weights
    model: Any = embedded.load_model() if ours else model_named(arguments)
    model.to(device_named(arguments))
    gflops = gflops_of(model, f"{SHARE:.0%}" if arguments.gflops is None else arguments.gflops)

    def loader(start: int) -> Any:
        return training_loader(
            images,
            model,
            batch_size=arguments.batch_size,
            steps=settings.steps,
            seed=settings.seed,
            start=start,
            augment=not ours,
            mixup=0,
            cutmix=0,
            smoothing=0,
            workers=0 if ours else default_workers(),
        )

    means = RunningMeans(1)
    with warnings_on(remarks), progress_of_steps(remarks, "predictors", settings.steps) as show:

        def report(step: int, loss: float) -> None:
            show(step, [f"loss {means(loss)[0]:.4f}"])

        predictors = train_predictors(model, loader, gflops, settings, report=report)
    predictors.save(arguments.output)
    results.print(f"{gflops:.4g} GFLOPs, {settings.steps} steps\n  {arguments.output}", soft_wrap=True, markup=False)
