from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from golden_cases import load_case
from timm.layers import Attention, SwiGLU, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from tiny_models import tiny_vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate_ext.compression.flops import flops
from diffrate_ext.schedule import Schedule


@pytest.mark.parametrize(
    ("name", "gflops", "counted"),
    [
        ("deit_small_patch16_224", 2.9, 2.905),
        ("deit_base_patch16_224", 11.5, 11.517),
        ("vit_base_patch16_224.mae", 11.5, 11.517),
        ("vit_large_patch16_224.mae", 42.3, 42.290),
        ("vit_huge_patch14_224.mae", 93.2, 92.107),
        ("vit_huge_patch14_224.mae", 103.4, 103.337),
        ("caformer_s36", 5.6, 5.604),
    ],
)
def test_published_schedules_cost_what_the_paper_says(name: str, gflops: float, counted: float) -> None:
    mean_pool = {"global_pool": "avg"} if name.endswith(".mae") else {}
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000, **mean_pool)
    assert round(flops(model, Schedule.published(name, gflops)) / 1e9, 3) == counted


@pytest.mark.parametrize("name", ["deit_eval_a", "deit_eval_b", "mae_eval_a", "caformer_eval_a"])
def test_golden_flops_are_exact(name: str) -> None:
    case = load_case(name)
    assert flops(case.model, case.schedule) == case.meta["flops"]


class WideAttention(Attention):
    """Heads of another width than channels / heads."""

    def __init__(self, dim: int, **arguments: Any) -> None:
        super().__init__(dim, attn_head_dim=12, **arguments)


TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"mlp_ratio": 2.5, "num_classes": 0},
        {"mlp_layer": SwiGLU},
        {"mlp_layer": SwiGLUPacked},
        {"attn_layer": WideAttention},
        {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"cls": Eva, "use_rot_pos_emb": True, "swiglu_mlp": True, "qkv_fused": False},
        {"cls": Eva, "num_reg_tokens": 2, "global_pool": "map"},
    ],
)
def test_uncompressed_flops_are_those_torch_counts(variant: dict[str, Any]) -> None:
    model = tiny_vit(**{**TINY, **variant}).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch counts matrix products
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 16))
    # the paper counts the patch embedding for the prefix tokens too; torch counts 2 for a multiply-accumulate
    extra = model.num_prefix_tokens * model.patch_embed.proj.weight.numel()
    assert flops(model) == counter.get_total_flops() // 2 + extra


def test_compression_saves_after_attention_and_in_all_later_blocks() -> None:
    model = VisionTransformer(**TINY)  # 17 tokens, 16 channels
    saved = flops(model) - flops(model, Schedule([17, 12, 12], [17, 10, 10]))
    mlp, attention = 8 * 16**2, 4 * 16**2
    assert saved == 7 * mlp + 7 * (attention + mlp) + 2 * (17**2 - 10**2) * 16


def test_flops_of_an_unknown_patch_embedding_are_refused() -> None:
    class Embedding(nn.Identity):
        grid_size = (4, 4)

    model = VisionTransformer(**TINY)
    model.patch_embed = Embedding()
    with pytest.raises(ValueError, match="patch_embed, a Embedding, are not known"):
        flops(model)


def test_flops_of_an_unknown_family_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Linear is not supported: expected .*VisionTransformer, Eva, MetaFormer"):
        flops(nn.Linear(2, 2))


def test_a_schedule_for_another_model_is_refused() -> None:
    model = VisionTransformer(**TINY)
    for schedule, message in [
        (Schedule([17] * 4, [17] * 4), "has 4 blocks, the model 3"),
        (Schedule([17] * 2, [17] * 2), "has 2 blocks, the model 3"),
        (Schedule([17] * 3, [17] * 3, prefix=2), "has 2 prefix tokens, the model 1"),
        (Schedule([17] * 3, [17] * 3, grid=(2, 8)), r"grid of \(2, 8\) patches, the model has \(4, 4\)"),
        (Schedule([17] * 3, [17] * 3, stages=(2, 1)), r"stages of \[2, 1\] blocks, the model has \[3\]"),
        (Schedule([197] * 3, [17] * 3), "keeps 197 tokens in a block, the model has only 17"),
    ]:
        with pytest.raises(ValueError, match=message):
            flops(model, schedule)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_cost_what_they_cost_before() -> None:
    """Their weights are packed, and they are no nn.Linear."""
    model = timm.create_model("deit_tiny_patch16_224").eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.blocks[0].mlp.fc1, nn.Linear)
    assert flops(quantised) == flops(model)


def test_layers_made_of_layers_cost_what_these_cost() -> None:
    """As an adapter of low rank beside the layer that it adapts."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = base.in_features, base.out_features
            self.base, self.down, self.up = base, nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    before, tokens = flops(model), 197
    model.blocks[0].mlp.fc1 = Adapted(model.blocks[0].mlp.fc1)
    assert flops(model) == before + tokens * 4 * (192 + 768)
