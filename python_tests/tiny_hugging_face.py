"""Tiny models of Hugging Face's transformers, and timm's models with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from tiny_models import spread_weights, tiny_vit
from torch import Tensor, nn

from diffrate_ext import RateSearch, Schedule
from diffrate_ext.models import adapter_for

transformers = pytest.importorskip("transformers", minversion="5")

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def made(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: spread_weights(getattr(transformers, model)(getattr(transformers, config)(**TINY, **options)))


def with_classes(family: str) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{family}Config")(vision_config=TINY, text_config=TINY, num_labels=5)
        return spread_weights(getattr(transformers, f"{family}ForImageClassification")(config))

    return build


MODELS: dict[str, Callable[[], Any]] = {
    "ViT": made("ViTModel", "ViTConfig"),
    "ViT with classes": made("ViTForImageClassification", "ViTConfig", num_labels=5),
    "DINOv2": made("Dinov2Model", "Dinov2Config"),
    "DINOv2, SwiGLU": made("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "DINOv2 with registers": made("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=2),
    "DINOv3": made("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=3, pos_embed_rescale=None),
    "CLIP": made("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIP with projection": made("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=5),
    "SigLIP": made("SiglipVisionModel", "SiglipVisionConfig"),
    "SigLIP without pool": made("SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
    "DINOv2 with classes": made("Dinov2ForImageClassification", "Dinov2Config", num_labels=5),
    "DINOv2 with registers and classes": made(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", num_register_tokens=2, num_labels=5
    ),
    "CLIP with classes": with_classes("CLIP"),
    "SigLIP with classes": with_classes("Siglip"),
}


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def schedule_for(model: nn.Module) -> Schedule:
    p = adapter_for(model).rules.prefix
    return Schedule([p + n for n in (16, 14, 8, 8)], [p + n for n in (16, 10, 8, 5)], prefix=p)


def result_of(output: Any) -> Tensor:
    """Logits, or what is nearest to them."""
    names = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
    found = next(output[name] for name in names if output.get(name) is not None)
    assert isinstance(found, Tensor)
    return found


def some_rates(model: nn.Module) -> RateSearch:
    """A search, not at its beginning."""
    rates = RateSearch(model)
    candidates = torch.arange(rates.n_patches, 0, -1)
    with torch.no_grad():
        for logits, most in ((rates.prune_logits, 13.3), (rates.merge_logits, 11.2)):
            for row in range(len(logits)):
                logits[row] = -(candidates - (most - 4 * row)).abs()
    return rates


def timms_vit(model: Any) -> nn.Module:
    """timm's model with the weights of a ViTForImageClassification."""
    twin = tiny_vit()
    for block in twin.blocks:
        block.norm1.eps = block.norm2.eps = 1e-12
    twin.norm.eps = 1e-12
    base = model.vit
    weights = {
        "cls_token": base.embeddings.cls_token,
        "pos_embed": base.embeddings.position_embeddings,
        **parameters("patch_embed.proj", base.embeddings.patch_embeddings.projection),
        **parameters("norm", base.layernorm),
        **parameters("head", model.classifier),
    }
    for index, layer in enumerate(base.layers):
        weights |= block_weights(f"blocks.{index}", layer, layer.layernorm_before, layer.layernorm_after)
        weights |= parameters(f"blocks.{index}.mlp.fc1", layer.mlp.fc1)
        weights |= parameters(f"blocks.{index}.mlp.fc2", layer.mlp.fc2)
    twin.load_state_dict(weights)
    return twin


def timms_dinov3(model: Any) -> nn.Module:
    """timm's model with the weights of a DINOv3ViTModel; its class token is the result."""
    twin = tiny_vit(
        Eva,
        num_classes=0,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        num_reg_tokens=3,
        init_values=1.0,
        global_pool="token",
        qkv_fused=False,
    )
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    weights = {
        "cls_token": model.embeddings.cls_token,
        "reg_token": model.embeddings.register_tokens,
        **parameters("patch_embed.proj", model.embeddings.patch_embeddings),
        **parameters("norm", model.norm),
    }
    for index, layer in enumerate(model.model.layer):
        name = f"blocks.{index}"
        weights |= {f"{name}.gamma_1": layer.layer_scale1.lambda1, f"{name}.gamma_2": layer.layer_scale2.lambda1}
        for one in ("q_proj", "k_proj", "v_proj"):
            weights |= parameters(f"{name}.attn.{one}", getattr(layer.attention, one))
        weights |= parameters(f"{name}.attn.proj", layer.attention.o_proj)
        weights |= parameters(f"{name}.norm1", layer.norm1) | parameters(f"{name}.norm2", layer.norm2)
        weights |= parameters(f"{name}.mlp.fc1", layer.mlp.up_proj) | parameters(f"{name}.mlp.fc2", layer.mlp.down_proj)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("rope" in name for name in missing)
    return twin


def block_weights(name: str, layer: Any, norm1: nn.Module, norm2: nn.Module) -> dict[str, Tensor]:
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    out = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {
        f"{name}.attn.qkv.weight": torch.cat([one.weight for one in three]),
        f"{name}.attn.qkv.bias": torch.cat([one.bias for one in three]),
        **parameters(f"{name}.attn.proj", out),
        **parameters(f"{name}.norm1", norm1),
        **parameters(f"{name}.norm2", norm2),
    }


def parameters(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{own}": weights.detach() for own, weights in module.named_parameters()}


def timms_siglip(model: Any) -> nn.Module:
    """timm's model with the weights of a SiglipVisionModel."""
    twin = tiny_vit(class_token=False, num_classes=0, global_pool="map", act_layer="gelu_tanh", norm_layer="layernorm")
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    embeddings, head = model.embeddings, model.head
    width, packed, bias = 16, head.attention.in_proj_weight, head.attention.in_proj_bias
    weights = {
        "pos_embed": embeddings.position_embedding.weight[None],
        **parameters("patch_embed.proj", embeddings.patch_embedding),
        **parameters("norm", model.post_layernorm),
        "attn_pool.latent": head.probe,
        "attn_pool.q.weight": packed[:width],
        "attn_pool.q.bias": bias[:width],
        "attn_pool.kv.weight": packed[width:],
        "attn_pool.kv.bias": bias[width:],
        **parameters("attn_pool.proj", head.attention.out_proj),
        **parameters("attn_pool.norm", head.layernorm),
        **parameters("attn_pool.mlp", head.mlp),
    }
    for index, layer in enumerate(model.encoder.layers):
        weights |= block_weights(f"blocks.{index}", layer, layer.layer_norm1, layer.layer_norm2)
        weights |= parameters(f"blocks.{index}.mlp", layer.mlp)
    twin.load_state_dict(weights)
    return twin
