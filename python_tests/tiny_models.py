"""Tiny models with attention that is far from uniform, and schedules for them."""

from __future__ import annotations

from typing import Any, TypeVar

import diffrate_ext  # before timm: it makes a torchvision of another torch importable

# isort: split
import torch
from timm.models.eva import Eva
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate_ext.methods import Predictors
from diffrate_ext.models import adapter_for

Model = TypeVar("Model", bound=nn.Module)

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def tiny_vit(cls: type[Any] = VisionTransformer, **changes: Any) -> Any:
    """16 patches of 4 x 4 pixels, 4 blocks."""
    return spread_weights(cls(**{**TINY, **changes}))


ROTARY: dict[str, dict[str, Any]] = {
    "rotary": {"use_rot_pos_emb": True},
    "rotary alone, registers": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 3,
        "init_values": 0.3,
        "qkv_bias": False,
    },
    "rotary by block and head": {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope"},
    "rotary, SwiGLU": {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False},
    "rotary, mean pool": {"use_rot_pos_emb": True, "global_pool": "avg", "scale_attn_inner": True},
    "rotary, norm afterwards": {"use_rot_pos_emb": True, "use_post_norm": True},
    "rotary, attention pool": {"use_rot_pos_emb": True, "global_pool": "map", "class_token": False},
    "rotary, any image size": {"use_rot_pos_emb": True, "dynamic_img_size": True},
    "Eva without rotary": {"global_pool": "avg", "use_fc_norm": False},
}


def tiny_eva(kind: str = "rotary", **changes: Any) -> Eva:
    """The same of timm's Eva: DINOv3, EVA-02, Perception Encoder and others."""
    model = tiny_vit(Eva, **{**ROTARY[kind], **changes})
    assert isinstance(model, Eva)
    return model


def tiny_caformer(**changes: Any) -> MetaFormer:
    """Attention stages of 4 blocks on 4 x 4 patches and 2 blocks on 2 x 2, for images of 64 x 64 pixels."""
    arguments: dict[str, Any] = {
        "num_classes": 5,
        "depths": (1, 1, 4, 2),
        "dims": (8, 16, 32, 64),
        "token_mixers": [SepConv, SepConv, Attention, Attention],
        "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        **changes,
    }
    model = spread_weights(MetaFormer(**arguments))
    model.pretrained_cfg = {"input_size": (3, 64, 64)}  # type: ignore[assignment]
    return model


def spread_weights(model: Model) -> Model:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_schedule(model: nn.Module) -> diffrate_ext.Schedule:
    """In some blocks pruning, in some merging, in some both."""
    if isinstance(model, MetaFormer):
        return diffrate_ext.Schedule(None, [16, 11, 7, 7, 4, 3], prefix=0, stages=(4, 2))
    p = model.num_prefix_tokens  # type: ignore[union-attr]
    return diffrate_ext.Schedule([p + n for n in (16, 14, 8, 8)], [p + n for n in (16, 10, 8, 5)], prefix=p)


def tiny_images(model: nn.Module, count: int = 3) -> Tensor:
    side = 64 if isinstance(model, MetaFormer) else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def blocks_of(model: Any) -> list[nn.Module]:
    """The attention blocks."""
    if isinstance(model, MetaFormer):
        return [block for stage in model.stages if not stage.use_nchw for block in stage.blocks]
    return list(model.blocks)


def attention_of(block: Any) -> nn.Module:
    return block.attn if hasattr(block, "attn") else block.token_mixer


def tiny_predictors(model: Any) -> Predictors:
    """One for each block, that tell patches apart."""
    predictors = Predictors.untrained(adapter_for(model), range(len(model.blocks)))
    return spread_weights(predictors).requires_grad_(False)
