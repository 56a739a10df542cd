"""The patch embedding of a compressed model: the same numbers, by a matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from compare import assert_within
from torch import Tensor, nn

from diffrate_ext import InputTypeError, Schedule, compress, restore
from diffrate_ext.models.patch_embedding import TiledConvolution, is_tiled

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZE, **changes}).eval()
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "reg_token", "pos_embed"):
            nn.init.normal_(parameter)
    return model


def keeping_all(model: Any) -> Schedule:
    prefix = model.num_prefix_tokens
    tokens = [model.patch_embed.num_patches + prefix] * len(model.blocks)
    return Schedule(tokens, tokens, prefix=prefix)


def embedded(model: Any, images: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(images))


@pytest.mark.parametrize("batch", [1, 8], ids=["few images", "many images"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reg_tokens": 3},
        {"no_embed_class": True, "reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"dynamic_img_size": True},
        {"pos_embed": "none"},
        {"img_size": (24, 40)},
    ],
    ids=str,
)
def test_embeds_as_timm_does(changes: dict[str, Any], batch: int) -> None:
    model = tiny(**changes)
    height, width = model.patch_embed.img_size
    if changes.get("dynamic_img_size"):
        height += 16
    images = torch.randn(batch, 3, height, width)
    with torch.no_grad():
        expected = embedded(model, images)
        actual = embedded(compress(model, keeping_all(model)), images)
    assert isinstance(model.patch_embed.proj, TiledConvolution)
    assert_within("tokens", actual, expected, 1e-5)
    assert actual.is_contiguous()


@pytest.mark.parametrize("autocast", [False, True])
def test_many_images_in_half_precision(autocast: bool) -> None:
    model = tiny().to(torch.float32 if autocast else torch.bfloat16)
    images = torch.randn(9, 3, 32, 32, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = embedded(model, images)
        actual = embedded(compress(model, keeping_all(model)), images)
    assert actual.dtype == expected.dtype
    assert_within("tokens", actual.float(), expected.float(), 0.06)


def test_channels_last_images() -> None:
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = embedded(model, images)
        compress(model, keeping_all(model))
        assert_within("tokens", embedded(model, images.to(memory_format=torch.channels_last)), expected, 1e-5)


def test_gradients() -> None:
    model = tiny()
    images = torch.randn(8, 3, 32, 32)

    def gradients() -> list[Tensor]:
        leaf = images.clone().requires_grad_()
        parameters = [model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed, model.cls_token]
        return list(torch.autograd.grad(embedded(model, leaf).square().sum(), [leaf, *parameters]))

    expected = gradients()
    compress(model, keeping_all(model))
    for actual, right in zip(gradients(), expected, strict=True):
        assert_within("gradient", actual / right.abs().max(), right / right.abs().max(), 1e-5)


def test_can_be_switched_off_and_is_undone() -> None:
    model: Any = tiny()
    compress(model, keeping_all(model))
    compress(model, keeping_all(model), linear_patch_embedding=False)
    assert type(model.patch_embed.proj) is nn.Conv2d
    compress(model, keeping_all(model))
    assert isinstance(model.patch_embed.proj, TiledConvolution)
    restore(model)
    assert type(model.patch_embed.proj) is nn.Conv2d


def test_hooks_see_the_convolution() -> None:
    model: Any = tiny()
    compress(model, keeping_all(model))
    shapes = []
    model.patch_embed.proj.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    model(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 24, 4, 4)]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 8, 4),
        nn.Conv2d(3, 4, 8, 8, padding=1),
        nn.Conv2d(3, 4, 1, 1, padding="same"),
        nn.Conv2d(3, 3, 8, 8, groups=3),
        nn.Conv2d(3, 4, 2, 2, dilation=2),
        nn.Linear(3, 4),
        None,
    ],
    ids=str,
)
def test_other_layers_stay(module: nn.Module | None) -> None:
    assert not is_tiled(module)


def test_pixels_that_fill_no_tile_are_left_out() -> None:
    convolution = nn.Conv2d(3, 4, (4, 2), (4, 2))
    assert is_tiled(convolution)
    images = torch.randn(2, 3, 11, 7)
    expected = convolution(images)
    convolution.__class__ = TiledConvolution
    assert_within("output", convolution(images), expected, 1e-5)


def test_hooks_on_the_dropout_see_all_images() -> None:
    model: Any = tiny()
    compress(model, keeping_all(model))
    shapes = []
    model.pos_drop.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        model(torch.randn(9, 3, 32, 32))
    assert shapes == [(9, 17, 24)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:There is a performance drop")
def test_many_images_traced_and_mapped() -> None:
    model: Any = tiny()
    compress(model, keeping_all(model))
    images = torch.randn(10, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        traced = torch.jit.trace(model, images, check_trace=False)
        assert_within("traced", traced(images[:3]), expected[:3], 1e-4)
        mapped = torch.func.vmap(model)(images.expand(2, -1, -1, -1, -1))
        assert_within("mapped", mapped[1], expected, 1e-4)


def test_wrong_channels_are_told_as_by_the_convolution() -> None:
    model: Any = tiny()
    compress(model, keeping_all(model))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels"):
        model(torch.randn(1, 4, 32, 32))


def test_the_switch_is_a_bool() -> None:
    model: Any = tiny()
    with pytest.raises(InputTypeError, match="linear_patch_embedding must be a bool, got str"):
        compress(model, keeping_all(model), linear_patch_embedding="no")  # type: ignore[arg-type]


def test_a_model_on_the_meta_device() -> None:
    model: Any = tiny()
    tokens = model.patch_embed.num_patches + 1
    compress(model, Schedule([tokens, tokens - 2], [tokens, tokens - 4], prefix=1)).to("meta")
    with torch.no_grad():
        assert model(torch.empty(9, 3, 32, 32, device="meta")).shape == (9, 5)
