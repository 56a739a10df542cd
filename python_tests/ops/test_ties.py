"""Among destinations whose rows are equal, bit by bit, a source goes to the one at the lowest position."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same
from torch import Tensor

from diffrate_ext import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def copied_rows(rows: Tensor, which: Tensor) -> Tensor:
    return rows.gather(1, which[..., None].expand(-1, -1, rows.shape[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("distinct", [1, 6], ids=["identical", "duplicated"])
@pytest.mark.parametrize("threads", [1, 3])
def test_ties_go_to_the_lowest_position(
    device: torch.device, dtype: torch.dtype, with_residual: bool, distinct: int, threads: int
) -> None:
    random = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens, channels, k_p, k_m in ((19, 5, 18, 9), (41, 37, 40, 38), (66, 64, 66, 20), (197, 96, 168, 156)):
            which = torch.randint(distinct, (2, tokens), generator=random)
            x = copied_rows(torch.randn(2, distinct, channels, generator=random), which).to(dtype)
            residual = copied_rows(torch.randn(2, distinct, channels, generator=random), which).to(dtype)
            importance = torch.rand(2, tokens - 1, generator=random)
            extra = {"residual": residual.to(device)} if with_residual else {}
            slot = ops.prune_merge(x.to(device), importance.to(device), k_p, k_m, **extra)[2].cpu()
            order = ops.sort_tokens(x, importance)[2]
            kind = which.gather(1, order)  # of each sorted position
            match = slot.gather(1, order[:, k_m:k_p])
            same = kind[:, None, 1:k_m] == kind.gather(1, match)[:, :, None]
            assert_same(f"first of {tokens} tokens, {channels} channels", match, same.int().argmax(2) + 1)
    finally:
        torch.set_num_threads(before)
