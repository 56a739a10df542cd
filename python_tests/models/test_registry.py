"""Models by the names that timm has for them, compressed or refused."""

from __future__ import annotations

from typing import Any

import pytest

from diffrate_ext import InputTypeError, compress, flops, restore, uniform_schedule  # before timm

# isort: split
import timm
import torch


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_clip_224",
        "vit_medium_patch16_gap_256",
        "vit_base_patch16_224.mae",
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3",
        "eva02_tiny_patch14_224",
        "eva02_base_patch16_clip_224",
        "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_rope_mixed_224",
        "vit_mediumd_patch16_rope_reg1_gap_256",
        "eva_giant_patch14_224",
    ],
)
def test_models_of_the_registry(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=112, depth=3, embed_dim=24, num_heads=2, num_classes=7).eval()
    schedule = uniform_schedule(model, 0.8 * flops(model) / 1e9)
    images = torch.randn(2, 3, 112, 112)
    before = model(images)
    after = compress(model, schedule)(images)
    assert after.shape == before.shape == (2, 7)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_backbone_of_the_registry(name: str) -> None:
    """timm's wrapper returns the features of some blocks as maps."""
    options: dict[str, Any] = {"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 2}
    backbone = timm.create_model(name, features_only=True, out_indices=[1, 3], **options).eval()
    images = torch.randn(2, 3, 64, 64)
    before = backbone(images)
    with pytest.raises(InputTypeError, match=r"FeatureGetterNet is not .* Its model is one, a .*: take that"):
        uniform_schedule(backbone, "80%")
    compress(backbone.model, gflops="80%")
    found = backbone(images)
    assert [features.shape for features in found] == [(2, 24, 4, 4)] * 2 == [features.shape for features in before]
    expected = backbone.model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(found[1], before[1], atol=1e-3)
    restore(backbone.model)
    for one, other in zip(backbone(images), before, strict=True):
        assert torch.equal(one, other)


def test_parallel_blocks_of_the_registry_are_refused() -> None:
    model = timm.create_model("vit_small_patch16_18x2_224", depth=3, embed_dim=24, num_heads=2)
    with pytest.raises(ValueError, match=r"blocks\[0\] is a ParallelThingsBlock"):
        uniform_schedule(model, 0.1)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("beit_base_patch16_224", "Beit"),
    ],
)
def test_families_of_the_registry_that_are_refused(name: str, cls: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for call in (lambda: compress(model, gflops="60%"), lambda: uniform_schedule(model, "60%"), lambda: flops(model)):
        with pytest.raises(InputTypeError, match=rf"^{cls} is not supported: expected one of timm's VisionTransformer"):
            call()
