"""What shape of a schedule is worth on the embedded model: ``python benchmarks/simple_schedules.py``.

The four schedules that a search may start from, on some embedded training images: how far the model's answers move
(Kullback-Leibler divergence in nats, by image) and how often its class stays.
"""

from __future__ import annotations

import argparse
import sys

import torch

from diffrate_ext import compressed_copy, embedded, flops
from diffrate_ext.methods import DiffRate
from diffrate_ext.rate_search.start import simple_schedules

NAMES = ("same number, half pruned", "same number, all merged", "same share, half pruned", "same share, all merged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4], help="of the FLOPs")
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    model = embedded.load_model()
    images = embedded.load_images("search")[0]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[: arguments.images]
    batches = embedded.normalize(images[chosen]).split(64)

    def answers(compressed: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([compressed(batch) for batch in batches]).log_softmax(1).double()

    plain = answers(model)
    print("| FLOPs | schedule | divergence | agreement |\n| --- | --- | --- | --- |")
    for share in arguments.shares:
        schedules = simple_schedules(model, share * flops(model) / 1e9, DiffRate())
        for name, schedule in zip(NAMES, schedules, strict=True):
            found = answers(compressed_copy(model, schedule))
            divergence = float((plain.exp() * (plain - found)).sum(1).mean())
            agreement = float((plain.argmax(1) == found.argmax(1)).double().mean())
            print(f"| {share:.0%} | {name} | {divergence:.4f} | {agreement:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
