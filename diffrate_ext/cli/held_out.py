"""The end of ``diffrate search``: what was learned against a uniform schedule, on images that it did not learn from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputValueError
from .parsing import not_negative

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..cost_table import CostTable
    from ..images.loading import ImageLoader
    from ..images.sources import ImageSource
    from ..judging import Judgement
    from ..rate_search.loop import SearchResult

HELD_OUT = 1000
"""Images at most, by default."""
SHARE = 10
"""Where there is no part for evaluation, one of so many images is kept from the training."""


def add_held_out_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--held-out",
        type=not_negative,
        default=HELD_OUT,
        metavar="N",
        help="compare with a uniform schedule at the end, on at most N images of the validation part; where there is "
        f"none, on every {SHARE}th image, kept from the training (default: {HELD_OUT}; 0: do not)",
    )


def hold_out(
    arguments: argparse.Namespace, images: ImageSource, model: Any, remarks: Console
) -> tuple[ImageSource, ImageSource | None]:
    """The images to learn from, and those to compare on; None where there are none."""
    from ..images.sources import some_of, spread_over

    if arguments.held_out == 0:
        return images, None
    part = _evaluation_part(arguments, images, model)
    if part is not None:
        return images, spread_over(part, arguments.held_out)
    n = len(images)
    kept = min(arguments.held_out, n // SHARE)
    if kept < 2:
        remarks.print(f"{images.where}: too few images to keep some for a comparison at the end", markup=False)
        return images, None
    numbers = [i * n // kept for i in range(kept)]
    rest = sorted(set(range(n)) - set(numbers))
    remarks.print(
        f"{images.where}: {kept:,} of {n:,} images are kept for a comparison at the end (--held-out)",
        soft_wrap=True,
        markup=False,
    )
    return some_of(images, rest), some_of(images, numbers)


def _evaluation_part(arguments: argparse.Namespace, training: ImageSource, model: Any) -> ImageSource | None:
    """The images' own part for evaluation, with the labels that fit the model; None where they have none."""
    from ..answers import has_classes, number_of_classes
    from ..images.sources import match_classes, open_images, without_labels

    try:
        part = open_images(arguments.images, purpose="evaluation")
    except InputValueError:  # several parts, none of which is plainly for that
        return None
    if part.where == training.where:
        return None
    try:
        return match_classes(part, number_of_classes(model)) if has_classes(model) else without_labels(part)
    except InputValueError:
        return without_labels(part)


def compare_with_uniform(
    model: nn.Module,
    results: Sequence[SearchResult],
    loader: ImageLoader,
    where: str,
    remarks: Console,
    costs: CostTable | None = None,
) -> list[str]:
    """What to say of each result of a search, towards targets of time where there are costs."""
    from rich.progress import Progress

    from ..compression.copies import compressed_copy
    from ..compression.costing import costing_of
    from ..compression.uniform import uniform_schedule
    from ..judging import judge

    models = []
    for result in results:
        target = costing_of(model, costs).options(result.target)
        uniform = uniform_schedule(model, method=result.schedule.method, **target)
        models += [compressed_copy(model, schedule) for schedule in (result.schedule, uniform)]
    with Progress(console=remarks) as progress:
        batches = progress.track(loader, total=len(loader), description="comparing with uniform")
        judged = judge(model, models, batches)
    pairs = zip(results, judged[::2], judged[1::2], strict=True)
    return [_said(f"{result.target:g} {result.unit}", learned, uniform, where) for result, learned, uniform in pairs]


def _said(target: str, learned: Judgement, uniform: Judgement, where: str) -> str:
    from ..paired import paired_interval

    error = "1 - cosine" if learned.agreement is None else "loss"
    difference = paired_interval(learned.errors, uniform.errors)
    verdict = {"lower": "learned is better", "higher": "UNIFORM IS BETTER"}.get(difference.verdict, difference.verdict)
    return "\n".join(
        [
            f"{target} on {len(learned.errors):,} images that were not learned from ({where}):",
            f"  learned: {_numbers(learned, error)}",
            f"  uniform: {_numbers(uniform, error)}",
            f"  learned - uniform: {error} {difference.mean:+.4f} "
            f"(95 % interval {difference.low:+.4f} to {difference.high:+.4f}): {verdict}",
        ]
    )


def _numbers(one: Judgement, error: str) -> str:
    words = [f"{error} {one.errors.mean():.4f}"]
    if one.top1 is not None:
        words.append(f"top-1 {one.top1:.2%}")
    if one.agreement is not None:
        words.append(f"agreement {one.agreement:.2%}")
    return ", ".join(words)
