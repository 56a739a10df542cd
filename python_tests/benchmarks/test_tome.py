"""ToMe as a rival: it is the published algorithm."""

from __future__ import annotations

import torch
from compare import assert_within
from golden_cases import load_case
from tome import ToMe, merge, tome_of_flops

from diffrate_ext import Schedule, flops


def test_equals_the_authors_results() -> None:
    case = load_case("tome_a")
    with torch.no_grad():
        logits = ToMe(case.model, case.meta["r"])(case.images)
    assert_within("logits", logits, case.arrays["logits"], 1e-4)


def test_sizes_add_up() -> None:
    x, keys = torch.randn(2, 17, 8), torch.randn(2, 17, 4)
    merged, size = merge(x, keys, None, 5)
    assert size is not None
    assert merged.shape == (2, 12, 8)
    assert_within("sizes", size.sum((1, 2)), torch.full((2,), 17.0), 1e-5)
    assert_within("features", (merged * size).sum(1), x.sum(1), 1e-4)


def test_takes_no_more_flops_than_asked() -> None:
    case = load_case("tome_a")
    uncompressed = flops(case.model)
    model = tome_of_flops(case.model, 0.8 * uncompressed)
    tokens = [case.model.patch_embed.num_patches + 1]  # type: ignore[union-attr,operator]
    for _ in case.model.blocks:  # type: ignore[union-attr]
        tokens.append(tokens[-1] - min(model.r, (tokens[-1] - 1) // 2))
    assert flops(case.model, Schedule(None, tokens[1:], prefix=1)) <= 0.8 * uncompressed
