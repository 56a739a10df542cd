"""The search step's parts that differ between families: how a block masks tokens, and how heads weigh masked ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_caformer, tiny_vit
from torch import Tensor, nn

from diffrate_ext import RateSearch
from diffrate_ext.methods.masking import BlockRates, MaskTokens
from diffrate_ext.models import adapter_for
from diffrate_ext.models.compressed import TokenState

TOKENS, ALIVE, MERGED = 20, 17, 9


@pytest.mark.parametrize("kind", ["class token", "registers", "no class token", "CAFormer"])
def test_a_block_masks_its_least_important_tokens(kind: str) -> None:
    """Every token is where its slot says, masked or not, and the gradient of its mask finds it there."""
    options: dict[str, Any] = {
        "registers": {"reg_tokens": 3},
        "no class token": {"class_token": False, "global_pool": "avg"},
    }
    model = tiny_caformer() if kind == "CAFormer" else tiny_vit(**options.get(kind, {}))
    rules = adapter_for(model).rules
    prefix, pruned = rules.prefix, TOKENS if kind == "CAFormer" else 14

    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, 6, generator=random, dtype=torch.float64)
    size = 1 + torch.rand(2, TOKENS, generator=random, dtype=torch.float64)
    importance = torch.rand(2, TOKENS - prefix, generator=random, dtype=torch.float64)
    mask = torch.ones(2, TOKENS, dtype=torch.float64)
    mask[:, prefix:].scatter_(1, importance.argsort(1)[:, : TOKENS - ALIVE], 0)
    mask.requires_grad_()
    rates = BlockRates(
        torch.ones(TOKENS, dtype=torch.float64),
        torch.ones(TOKENS, dtype=torch.float64),
        torch.tensor(float(pruned), dtype=torch.float64),
        torch.tensor(float(MERGED), dtype=torch.float64),
    )
    step = MaskTokens(rules, rates, TokenState(size, mask))
    step.importance = importance  # as attention would give it
    out = step.reduce(0.25 * x, 0.75 * x)
    state, slot = step.after, step.slot
    assert slot is not None
    assert state.mask is not None
    assert state.size is not None
    assert state.mask.tolist() == [[1.0] * MERGED + [0.0] * (TOKENS - MERGED)] * 2
    weights = torch.randn(2, TOKENS, generator=random, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((state.mask * weights).sum(), mask)

    for image in range(2):
        assert slot[image, :prefix].tolist() == list(range(prefix))
        # what is alive comes first, by importance
        ranks = importance[image].argsort(descending=True) + prefix
        places = slot[image, ranks[: MERGED - prefix]]
        assert places.tolist() == list(range(prefix, MERGED))
        merged = 0
        for token in range(TOKENS):
            place = int(slot[image, token])
            together = (slot[image] == place).nonzero().flatten()
            merged += len(together) > 1
            torch.testing.assert_close(out[image, place], x[image, together].mean(0))
            if len(together) == 1:
                unmasked = place < MERGED or place >= ALIVE  # what was masked before stays as it was
                assert gradient[image, token] == (weights[image, place] if unmasked else 0.0)
                torch.testing.assert_close(state.size[image, place], size[image, token])
        assert merged > 0
    if kind == "CAFormer":  # the most important token takes no other in, and sizes add up
        assert ((slot == 0).sum(1) == 1).all()
        torch.testing.assert_close(state.size[:, :MERGED].sum(1), (size * mask).sum(1))


def head(**changes: Any) -> tuple[Any, Tensor, Tensor]:
    """A search's model, tokens, and sizes that a gradient reaches, some of them zero."""
    model = tiny_vit(**{"class_token": False, **changes}).double()
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    RateSearch(model)
    size = 1 + torch.rand(2, 16, dtype=torch.float64)
    size[:, 11:] = 0
    return model, torch.randn(2, 16, 16, dtype=torch.float64), size.requires_grad_()


@pytest.mark.parametrize("pool", ["avg", "map", "avgmax", "max"])
def test_masked_tokens_have_no_weight_in_the_head(pool: str) -> None:
    model, tokens, size = head(global_pool=pool)
    expected = model.forward_head(tokens[:, :11], size=size.detach()[:, :11])
    torch.testing.assert_close(model.forward_head(tokens, size=size), expected)
    assert not torch.allclose(model.forward_head(tokens, size=size.detach() + 1), expected)


def test_the_gradient_of_sizes_in_attention_pooling() -> None:
    model, tokens, size = head(global_pool="map")
    nn.init.normal_(model.attn_pool.q.weight)
    nn.init.normal_(model.attn_pool.kv.weight)
    assert torch.autograd.gradcheck(lambda size: model.forward_head(tokens, size=size), [size])


def test_the_gradient_of_sizes_in_mean_pooling() -> None:
    """... takes the sum they are divided by for a constant (method of the paper's authors)."""
    model, tokens, size = head(global_pool="avg", fc_norm=False)
    out = model.forward_head(tokens, size=size)
    (gradient,) = torch.autograd.grad(out.sum(), size)
    expected = (tokens @ model.head.weight.T).sum(-1) / size.sum(1, keepdim=True)
    torch.testing.assert_close(gradient, expected.detach())
