"""Rotary positions travel with their tokens: compressed models against a forward pass that follows every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ROTARY, tiny_eva, tiny_images, tiny_schedule
from torch import Tensor

from diffrate_ext import InputValueError, Schedule, compress, reference, restore
from diffrate_ext.models import adapter_for
from diffrate_ext.schedule import scale_kept_numbers

KINDS = ["rotary", "rotary alone, registers", "rotary by block and head", "rotary, SwiGLU", "rotary, mean pool"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["diffrate", "tome", "evit", "diffrate:operations=merge_prune"])
def test_every_token_is_turned_by_its_own_position(kind: str, method: str) -> None:
    model = tiny_eva(kind)
    prefix, images = model.num_prefix_tokens, tiny_images(model)
    schedule = tiny_schedule(model)
    if method != "diffrate":  # the numbers after the block count alone
        schedule = Schedule(None, [prefix + n for n in (16, 12, 8, 6)], prefix=prefix)
    if "merge_prune" in method:
        schedule = tiny_schedule(model)
    with torch.no_grad():
        expected, moved = followed(model, images, schedule, method)
        torch.testing.assert_close(compress(model, schedule, method=method)(images), expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(moved, torch.arange(moved.shape[1]).expand_as(moved))


@pytest.mark.parametrize("kind", [kind for kind in ROTARY if kind != "rotary, norm afterwards"])
def test_a_schedule_that_removes_nothing_changes_no_bit(kind: str) -> None:
    """With gradients; without, norms are fused with sums and rounded once less."""
    model = tiny_eva(kind)
    images, tokens = tiny_images(model), model.num_prefix_tokens + 16
    before = model(images)
    compress(model, Schedule(None, [tokens] * 4, prefix=model.num_prefix_tokens), linear_patch_embedding=False)
    assert torch.equal(model(images), before)


def test_positions_matter() -> None:
    """What the first test relies on: the wrong positions would be seen."""
    model, schedule = tiny_eva(), tiny_schedule(tiny_eva())
    images = tiny_images(model)
    with torch.no_grad():
        right, _ = followed(model, images, schedule, "diffrate")
        wrong, _ = followed(model, images, schedule, "diffrate", moving=False)
    assert (right - wrong).abs().max() > 0.01


def test_patch_dropout() -> None:
    """Its patches, other ones in every image, bring their positions."""
    model = tiny_eva(patch_drop_rate=0.25).train()
    images = tiny_images(model)
    torch.manual_seed(3)
    before = model(images)
    compress(model, Schedule(None, [17] * 4, prefix=1), linear_patch_embedding=False)
    torch.manual_seed(3)
    assert torch.equal(model(images), before)
    schedule = tiny_schedule(model)
    of_twelve = scale_kept_numbers(schedule.kept_numbers(17), 17, 13, 1, 2)
    torch.manual_seed(3)
    expected, _ = followed(restore(model), images, Schedule(*zip(*of_twelve, strict=True), prefix=1), "diffrate")
    compress(model, schedule)
    torch.manual_seed(3)
    torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=1e-4)


def test_shared_keys_and_values() -> None:
    try:
        model = tiny_eva(attn_type="rope", qkv_fused=False, qk_norm=True, num_heads=4, num_kv_heads=2)
    except TypeError:
        pytest.skip("this timm has no such models")
    images = tiny_images(model)
    before = model(images)
    compress(model, Schedule(None, [17] * 4, prefix=1), linear_patch_embedding=False)
    assert torch.equal(model(images), before)


def test_unsupported_parts_are_named() -> None:
    model = tiny_eva()
    model.blocks[2].attn = torch.nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(InputValueError, match=r"blocks\[2\]\.attn is a Identity.*EvaAttention and AttentionRope"):
        compress(model, tiny_schedule(tiny_eva()))


def followed(
    model: Any, images: Tensor, schedule: Schedule, method: str, *, moving: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits, and for each token that is left the patch whose position it has.

    Args:
        moving: else positions stay where they were, whatever token comes to stand there.
    """
    prefix, rules = model.num_prefix_tokens, adapter_for(model).rules
    x, rope = model._pos_embed(model.patch_embed(images))
    x = model.norm_pre(x)
    origin = torch.arange(x.shape[1]).repeat(len(x), 1)
    size: Tensor | None = None
    for index, (block, (k_p, k_m)) in enumerate(zip(model.blocks, schedule.kept_numbers(x.shape[1]), strict=True)):
        embedding = rope[index] if model.rope_mixed else rope[None]  # (1 or H, N, 2D)
        by_image = rope if rope.ndim == 4 and not model.rope_mixed else [embedding] * len(x)  # after patch dropout
        patches = origin[:, prefix:] - prefix if moving else torch.arange(x.shape[1] - prefix).repeat(len(x), 1)
        positions = torch.stack(
            [one[:, patch] for one, patch in zip(by_image, patches, strict=True)]
        )  # (B, 1 or H, N-P, 2D)
        bias = None if size is None else size.log()[:, None, None]
        seen: dict[str, Tensor] = {}
        branch = attention(block.attn, block.norm1(x), positions, bias, seen)
        branch = branch if block.gamma_1 is None else block.gamma_1 * branch
        x = x + branch
        if k_m < x.shape[1]:
            x, size, source = reduced(x, size, seen, k_p, k_m, prefix, rules.importance_from, method)
            origin = origin.gather(1, source)
        mlp = block.mlp(block.norm2(x))
        x = x + (mlp if block.gamma_2 is None else block.gamma_2 * mlp)
    x = model.norm(x)
    if model.global_pool == "avg":
        weights = torch.ones(x.shape[:2]) if size is None else size
        weights = weights[:, prefix:, None] / weights[:, prefix:, None].sum(1, keepdim=True)
        return model.head(model.fc_norm((x[:, prefix:] * weights).sum(1))), origin
    return model.forward_head(x), origin


def attention(attn: Any, x: Tensor, positions: Tensor, bias: Tensor | None, seen: dict[str, Tensor]) -> Tensor:
    """As timm's module computes it, with a bias for the sizes of keys. ``seen``: the attention map and the keys."""

    def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        seen["map"] = (logits if bias is None else logits + bias).softmax(-1)
        seen["keys"] = k
        return seen["map"] @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product)
        out: Tensor = attn(x, rope=positions)
    return out


def reduced(
    x: Tensor,
    size: Tensor | None,
    seen: dict[str, Tensor],
    k_p: int,
    k_m: int,
    prefix: int,
    importance_from: str,
    method: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens and sizes that are left, and which of the block's tokens each is."""
    mean = seen["map"].mean(1)
    importance = (mean[:, 0] if importance_from == "class" else mean.mean(1))[:, prefix:]
    order = torch.cat([torch.arange(prefix).repeat(len(x), 1), importance.argsort(1, descending=True) + prefix], 1)
    if method == "tome":
        slot = reference.bipartite_match(seen["keys"].mean(1), x.shape[1] - k_m, prefix=prefix)
        sizes = torch.ones(x.shape[:2]) if size is None else size
        merged = reference.merge_reduce(x, slot, k_m, weights=sizes)
        source = torch.zeros(len(x), k_m, dtype=torch.int64)
        for image, places in enumerate(slot.tolist()):
            for place in range(k_m):
                inside = [token for token, other in enumerate(places) if other == place]
                source[image, place] = inside[0] if len(inside) == 1 else next(token for token in inside if token % 2)
        return merged, torch.zeros(len(x), k_m).scatter_add(1, slot, sizes), source
    if method == "evit":
        rest = importance.gather(1, order[:, k_m - 1 :] - prefix)
        tokens = x.gather(1, order[..., None].expand_as(x))
        fused = (rest[..., None] * tokens[:, k_m - 1 :]).sum(1, keepdim=True)
        return torch.cat([tokens[:, : k_m - 1], fused], 1), None, order[:, :k_m]
    if "merge_prune" in method:
        pruned = k_p - k_m
        x, size, *_ = reference.prune_merge(x, importance, x.shape[1], x.shape[1] - pruned, size, prefix=prefix)
        return x[:, :k_m], size[:, :k_m], order[:, :k_m]
    x, size, *_ = reference.prune_merge(x, importance, k_p, k_m, size, prefix=prefix)
    return x, size, order[:, :k_m]
