from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention, DiffAttention, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from tiny_models import ROTARY, TINY, tiny_eva, tiny_schedule, tiny_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffrate_ext.compression.compress import compress, restore, token_slots
from diffrate_ext.compression.copies import compressed_copy
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.errors import InputValueError
from diffrate_ext.models.compressed import Step
from diffrate_ext.rate_search.rates import RateSearch
from diffrate_ext.schedule import Schedule, scale_kept_numbers


class GatedAttention(Attention):
    def __init__(self, dim: int, **arguments: Any) -> None:
        super().__init__(dim, gated=True, **arguments)


class WideAttention(Attention):
    def __init__(self, dim: int, **arguments: Any) -> None:
        super().__init__(dim, attn_head_dim=12, **arguments)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "q/k norm": {"qk_norm": True},
    "q/k RMS norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "scale norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "gated attention": {"attn_layer": GatedAttention},
    "wide heads": {"attn_layer": WideAttention},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "residual after norm": {"block_fn": ResPostBlock},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "packed SwiGLU": {"mlp_layer": SwiGLUPacked},
    "drop path": {"drop_path_rate": 0.2, "proj_drop_rate": 0.1},
    "pre-norm": {"pre_norm": True},
    "registers": {"reg_tokens": 3},
    "no position of the class token": {"no_embed_class": True, "reg_tokens": 2},
    "mean pool with class token": {"global_pool": "avg"},
    "mean pool over the prefix too": {"global_pool": "avg", "pool_include_prefix": True},
    "mean pool after the norm": {"global_pool": "avg", "fc_norm": False},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "only registers": {"class_token": False, "reg_tokens": 4, "global_pool": "avg"},
    "max pool": {"global_pool": "max"},
    "mean and max pool": {"global_pool": "avgmax", "class_token": False},
    "attention pool": {"global_pool": "map", "class_token": False},
    "attention pool with class token": {"global_pool": "map"},
    "no pool": {"global_pool": ""},
    "no classes": {"num_classes": 0},
    "any image size": {"dynamic_img_size": True},
}


def build(variant: str = "plain", **changes: Any) -> Any:
    if variant in ROTARY:
        return tiny_eva(variant, **changes)
    return tiny_vit(**{**VARIANTS[variant], **changes})


def schedule_for(model: VisionTransformer, *, prune: bool = True) -> Schedule:
    schedule = tiny_schedule(model)
    return schedule if prune else Schedule(None, schedule.after_merging, prefix=schedule.prefix)


@pytest.fixture(params=[*VARIANTS, *ROTARY])
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    return build(request.param)


class PlainStep(Step):
    """Attention as timm computes it, and no token less."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


def test_a_compressed_block_is_timms_around_its_step(model: VisionTransformer) -> None:
    x = torch.randn(2, 17, 16)
    x = x.repeat(1, 2, 1)[:, : model.num_prefix_tokens + 16]
    step = PlainStep()
    rope = getattr(model, "rope", None)
    if rope is None:
        expected = model.blocks[1](x)
    else:
        step.positions = rope.get_embed((4, 4))
        if getattr(model, "rope_mixed", False):
            step.positions = step.positions[1]
        expected = model.blocks[1](x, rope=step.positions)
    compress(model, schedule_for(model))
    torch.testing.assert_close(model.blocks[1](x, step), expected)


def test_restore_gives_back_the_model_as_it_was(model: VisionTransformer) -> None:
    images = torch.randn(2, 3, 16, 16)
    before, keys, attributes = model(images), list(model.state_dict()), dict(vars(model))
    cls, blocks = type(model), [type(module) for module in model.modules()]
    assert compress(model, schedule_for(model)) is model
    compressed = model(images)
    assert list(model.state_dict()) == keys
    assert isinstance(model, cls)
    assert compressed.shape[:1] + compressed.shape[-1:] == before.shape[:1] + before.shape[-1:]
    assert compressed.isfinite().all()
    assert compressed.shape != before.shape or not torch.allclose(compressed, before)
    assert restore(model) is model
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert vars(model) == attributes
    assert [type(module) for module in model.modules()] == blocks


def test_merging_equal_tokens_changes_nothing(model: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, pooling and importance count a merged token as often as it has tokens: exactly so for equal ones."""
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    rope: Any = getattr(model, "rope", None)
    if rope is not None:  # all at the same place
        embedding = rope.get_embed((4, 4))
        monkeypatch.setattr(rope, "get_embed", lambda *_, **__: embedding[..., :1, :].expand_as(embedding))
    images = torch.randn(2, 3, 1, 1).expand(-1, -1, 16, 16)  # all patches alike
    before = model(images)
    compress(model, schedule_for(model, prune=False))
    tokens, size = model.forward_tokens(images)
    prefix = model.num_prefix_tokens
    assert tokens.shape[1] == prefix + 5
    torch.testing.assert_close(size.sum(1), torch.full((2,), prefix + 16.0))
    after = model(images)
    if model.global_pool == "":  # logits of every token
        before, after = before[:, 0], after[:, 0]
    torch.testing.assert_close(after, before)


def test_a_schedule_that_removes_nothing_changes_nothing(model: VisionTransformer) -> None:
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    tokens = model.num_prefix_tokens + 16
    compress(model, Schedule([tokens] * 4, [tokens] * 4, prefix=model.num_prefix_tokens))
    torch.testing.assert_close(model(images), before)


def test_token_slots_follow_every_token(model: VisionTransformer) -> None:
    schedule = schedule_for(model)
    slots = token_slots(compress(model, schedule), torch.randn(3, 3, 16, 16))
    prefix, tokens = schedule.prefix, schedule.prefix + 16
    assert len(slots) == 4
    gone = torch.zeros(3, tokens, dtype=torch.bool)
    for slot, (_, k_m) in zip(slots, schedule.kept_numbers(tokens), strict=True):
        assert slot.shape == (3, tokens)
        assert slot.dtype == torch.int64
        assert torch.equal(slot[:, :prefix], torch.arange(prefix).expand(3, -1))
        for row in slot:
            assert set(row[row >= 0].tolist()) == set(range(k_m))
        assert not (gone & (slot >= 0)).any()  # a pruned token does not come back
        gone = slot < 0
    assert gone.any()


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_of_any_size(batch: int) -> None:
    for variant in ("plain", "no class token", "attention pool"):
        model = build(variant)
        assert compress(model, schedule_for(model))(torch.randn(batch, 3, 16, 16)).shape == (batch, 5)


def test_images_do_not_depend_on_their_batch(model: VisionTransformer) -> None:
    images = torch.randn(3, 3, 16, 16)
    compress(model, schedule_for(model))
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


@pytest.mark.parametrize(
    "variant", ["plain", "q/k norm", "only registers", "attention pool", "mean pool after the norm"]
)
def test_half_precision(variant: str) -> None:
    model = build(variant)
    compress(model, schedule_for(model))
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).isfinite().all()
    model.bfloat16()
    logits = model(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert model.forward_tokens(images.bfloat16())[1].dtype == torch.float32


def test_an_image_of_another_size_keeps_the_rates() -> None:
    model = build("any image size")
    compress(model, schedule_for(model))
    for side, kept in [(16, 5), (24, 12), (8, 2)]:  # 5 of 16 patches, rounded up
        tokens, _ = model.forward_tokens(torch.randn(2, 3, side, side))
        assert tokens.shape == (2, 1 + kept, 16)


@pytest.mark.parametrize("variant", ["plain", "rotary"])
@pytest.mark.parametrize("size", [(16, 24), (18, 22), (13, 31)])
def test_images_that_are_padded_to_whole_patches(variant: str, size: tuple[int, int]) -> None:
    """The model's own image size, whether or not it is one of whole patches, and another."""
    model = build(variant, img_size=size, dynamic_img_size=True, dynamic_img_pad=True)
    rows, columns = (math.ceil(side / 4) for side in size)
    schedule = uniform_schedule(model, "70%")
    assert schedule.grid == (rows, columns)
    whole = build(variant, img_size=(4 * rows, 4 * columns))
    for given in (None, schedule):
        assert flops(model, given) == flops(whole, given)

    compress(model, schedule)
    for height, width in (size, (23, 30)):
        images = torch.randn(2, 3, height, width)
        grid = math.ceil(height / 4), math.ceil(width / 4)
        kept = scale_kept_numbers(
            schedule.kept_numbers(1 + rows * columns), 1 + rows * columns, 1 + grid[0] * grid[1], 1, 2
        )
        assert [int(slot.max()) + 1 for slot in token_slots(model, images)] == [after for _, after in kept]
        assert model(images).shape == (2, 5)
        (features,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        assert features.shape == (2, 16, *grid)


def test_pruning_to_the_prefix() -> None:
    model = build("registers")
    schedule = Schedule([20, 20, 10, 4], [20, 18, 8, 4], prefix=4)
    assert compress(model, schedule).forward_features(torch.randn(2, 3, 16, 16)).shape == (2, 4, 16)
    pooling = build("mean pool with class token")
    with pytest.raises(ValueError, match="leaves 1 tokens, all of them prefix, but the model pools over patches"):
        compress(pooling, Schedule([17, 9, 9, 1], [17, 9, 9, 1]))


def test_gradients_flow_to_every_weight_and_checkpointing_changes_none() -> None:
    images = torch.randn(2, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        model = build("layer scale").train()
        model.set_grad_checkpointing(checkpointing)
        compress(model, schedule_for(model))(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_training_with_drop_path() -> None:
    torch.manual_seed(0)
    model = build("drop path").train()
    compress(model, schedule_for(model))
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_attention_dropout_is_refused_in_training_only() -> None:
    model = build(attn_drop_rate=0.1)
    compress(model, schedule_for(model))
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()
    with pytest.raises(ValueError, match=r"attention dropout \(0\.1\)"):
        model.train()(torch.randn(2, 3, 16, 16))


def test_patch_dropout_in_training_scales_the_numbers() -> None:
    model = build(patch_drop_rate=0.5).train()
    assert compress(model, schedule_for(model)).forward_features(torch.randn(2, 3, 16, 16)).shape == (2, 1 + 3, 16)


@pytest.mark.parametrize("training", [False, True])
def test_a_distilled_model(training: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformerDistilled(**TINY).train(training)
    model.set_distilled_training(True)
    compress(model, schedule_for(model))
    logits = model(torch.randn(2, 3, 16, 16))
    assert isinstance(model, VisionTransformerDistilled)
    assert len(logits) == 2  # class and distillation logits in training; else two images
    assert isinstance(logits, tuple) == training
    assert type(restore(model)) is VisionTransformerDistilled


class OwnBlock(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x


class OwnHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_fn": ParallelScalingBlock}, r"blocks\[0\] is a ParallelScalingBlock, which is not supported"),
        ({"block_fn": ParallelThingsBlock}, r"blocks\[0\] is a ParallelThingsBlock, which is not supported"),
        ({"block_fn": OwnBlock}, r"blocks\[0\] is a OwnBlock, which is not supported"),
        ({"attn_layer": DiffAttention}, r"blocks\[0\]\.attn is a DiffAttention, which is not supported"),
        ({"global_pool": "prr"}, "global_pool='prr' is not supported"),
        ({"depth": 0}, "the model has no blocks"),
    ],
)
def test_unsupported_parts_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(VisionTransformer(**{**TINY, **arguments}), Schedule([17] * 4, [17] * 4))


def test_a_model_with_a_head_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OwnHead overrides VisionTransformer\.forward_head"):
        compress(OwnHead(**TINY), Schedule([17] * 4, [17] * 4))


def test_masks_are_refused() -> None:
    model = build()
    compress(model, schedule_for(model))
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="takes no attn_mask"):
            call(torch.randn(2, 3, 16, 16), is_causal=True)


def test_the_head_alone_needs_sizes_where_it_weighs_tokens() -> None:
    images = torch.randn(2, 3, 16, 16)
    model = build()
    compress(model, schedule_for(model))
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
    for variant in ("mean pool with class token", "attention pool", "mean and max pool"):
        model = build(variant)
        compress(model, schedule_for(model))
        tokens, size = model.forward_tokens(images)
        assert torch.equal(model.forward_head(tokens, size=size), model(images))
        assert model.forward_head(tokens, pre_logits=True, size=size).shape == (2, 16)
        with pytest.raises(ValueError, match=r"head needs the sizes of the tokens.*forward_tokens"):
            model.forward_head(tokens)


def test_the_head_finds_the_sizes_of_the_features_it_is_given(model: VisionTransformer) -> None:
    """As wrappers call timm's models: Hugging Face's, for one."""
    images = torch.randn(2, 3, 16, 16)
    compress(model, schedule_for(model))
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    features, _ = model.forward_intermediates(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert "_diffrate_size" not in vars(features.clone())


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_a_head_that_pools_over_patches_needs_one(pool: str) -> None:
    """A schedule that was right for a class token, and a head that came later."""
    model, images = build(), torch.randn(2, 3, 16, 16)
    compress(model, Schedule([17, 9, 9, 1], [17, 9, 9, 1]))
    assert model(images).shape == (2, 5)
    message = rf"'{pool}' pools over patches, but the schedule leaves none: 1 tokens, 1"
    with pytest.raises(InputValueError, match=message):
        model.reset_classifier(10, global_pool=pool)
    model.global_pool = pool  # past the check
    with pytest.raises(InputValueError, match=message):
        model(images)


@pytest.mark.parametrize("variant", ["plain", "rotary"])
def test_a_new_pool_is_checked(variant: str) -> None:
    model, images = build(variant, global_pool="token"), torch.randn(2, 3, 16, 16)
    compress(model, Schedule([17, 17, 1, 1], [17, 10, 1, 1]))
    with pytest.raises(InputValueError, match=r"global_pool='avg' pools over patches.*: 1 tokens, 1 of them prefix"):
        model.reset_classifier(3, "avg")
    assert model.global_pool == "token"
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    compress(model, schedule_for(model))
    model.reset_classifier(7, "avg")
    tokens, size = model.forward_tokens(images)
    torch.testing.assert_close(model(images), model.forward_head(tokens, size=size))
    assert model(images).shape == (2, 7)
    RateSearch(model)
    model.reset_classifier(4, "max")
    assert model(images).shape == (2, 4)


@pytest.mark.parametrize("variant", ["plain", "only registers", "rotary"])
def test_intermediate_features_are_back_on_their_grid(variant: str) -> None:
    model, images = build(variant), torch.randn(2, 3, 16, 16)
    prefix = model.num_prefix_tokens
    expected_first = model.forward_intermediates(images, indices=[0], intermediates_only=True)[0]
    schedule = schedule_for(model)
    slots = token_slots(compress(model, schedule), images)
    final, features = model.forward_intermediates(images, return_prefix_tokens=True)
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(features[0][0], expected_first)
    assert [patches.shape for patches, _ in features] == [(2, 16, 4, 4)] * 4
    assert [tokens.shape for _, tokens in features] == [(2, prefix, 16)] * 4

    for fill in ("last", "nearest", "zeros"):
        found = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NLC", fill=fill)[1][0]
        for image in range(2):
            for patch in range(16):
                place = slots[-1][image, prefix + patch]
                if place >= 0:
                    wanted = final[image, place]
                elif fill == "zeros":
                    wanted = torch.zeros(16)
                elif fill == "last":  # after the last block that it left, or as it came
                    rest = [block for block, slot in enumerate(slots) if slot[image, prefix + patch] >= 0]
                    came = model._embed(images)[0][image, prefix + patch]
                    before = features[rest[-1]][0][image].flatten(1)[:, patch] if rest else came
                    wanted = model.norm(before)
                else:
                    left = [other for other in range(16) if slots[-1][image, prefix + other] >= 0]
                    nearest = min(left, key=lambda other: (patch // 4 - other // 4) ** 2 + (patch % 4 - other % 4) ** 2)
                    wanted = final[image, slots[-1][image, prefix + nearest]]
                torch.testing.assert_close(found[image, patch], wanted)
    assert any((slot < 0).any() for slot in slots)

    early = model.forward_intermediates(images, indices=[0, 1], stop_early=True, output_dict=True)
    torch.testing.assert_close(early["image_intermediates"][1], features[1][0])
    assert early["image_features"].shape == (2, prefix + 10, 16)
    if hasattr(model, "get_intermediate_layers"):
        assert model.get_intermediate_layers(images, n=2)[0].shape == (2, 16, 16)
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match="fill must be one of 'last', 'nearest', 'zeros', got 'mean'"):
        model.forward_intermediates(images, fill="mean")


@pytest.mark.parametrize("searching", [False, True])
def test_a_model_that_is_cut_short(searching: bool) -> None:
    """Its blocks are in a new container, which is in training mode whatever the model is in."""
    images = torch.randn(2, 3, 16, 16)
    model = build("layer scale")
    if searching:
        rates = RateSearch(model).eval()
        rates.set_schedule(schedule_for(model))
        plain = compressed_copy(model, rates.schedule())
    else:
        compress(model, schedule_for(model))
        plain = compressed_copy(model, schedule_for(model))
    whole = plain.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    early = model.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert model.blocks.training
    assert len(model.blocks) == 2
    cut = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    for expected, one, other in zip(whole, early, cut, strict=True):
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(other, expected)
    assert model(images).shape == (2, 11, 16)
    if searching:
        assert len(rates.schedule()) == 2
        assert rates.gflops().item() == pytest.approx(flops(model, rates.schedule()) / 1e9)
        rates.train()(images).sum().backward()


class SquareRecorder(TorchDispatchMode):
    """Notes every operator output in memory of its own that has two dimensions of ``side`` or more."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            long = [
                length
                for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
                if length >= self.side and stride > 0
            ]
            if len(long) >= 2:
                self.found.append(f"{func}: {tuple(tensor.shape)}")
        return result


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from tensors_in(part)


@pytest.mark.parametrize("importance", ["class", "received"])
def test_no_attention_map_is_ever_built(importance: str) -> None:
    torch.manual_seed(0)
    pool = {} if importance == "class" else {"class_token": False, "global_pool": "avg"}
    model = VisionTransformer(
        img_size=64, patch_size=4, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=5, **pool
    ).eval()
    images, prefix = torch.randn(2, 3, 64, 64), model.num_prefix_tokens
    # all numbers of tokens stay above 100, all other dimensions below
    schedule = Schedule([256, 220, 220, 150], [256, 200, 200, 120], prefix=prefix)
    compress(model, schedule)
    with torch.no_grad(), SquareRecorder(100) as compressed:
        model(images)
    assert compressed.found == []

    restore(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), SquareRecorder(100) as unfused:
        model(images)
    assert len(unfused.found) >= 4  # the recorder does see maps
