"""timm's VisionTransformer: DeiT, AugReg, DINOv2, CLIP, SigLIP, MAE and others."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from .. import ops
from ..flops import BlockCost, ModelCost, StageCost
from ..schedule import Schedule
from .base import (
    Adapter,
    AttentionFunction,
    BlockCompressor,
    CompressedModule,
    Observer,
    Stage,
    attention_of_packed_qkv,
    has_forward_of,
    original_class,
    weight_count,
)
from .masked import SearchPlan

_POOLS_WITHOUT_SIZES = ("token", "max", "")


class CompressedVisionTransformer(CompressedModule, VisionTransformer):
    """A VisionTransformer whose blocks drop and merge tokens.

    ``forward_features`` returns the tokens that are left, (B, K, C). ``forward_head`` needs their sizes where it
    averages or attends over patches: ``forward_tokens`` gives both.
    """

    def forward_tokens(self, x: Tensor, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Images to the tokens that are left (B, K, C), normalised, and their sizes (B, K), float32.

        In the search step (training mode of a :class:`RateSearch`) all N tokens are there, and masked ones have size 0.
        """
        x = self._embed(x)
        x, size = self._diffrate_plan.run(self.blocks, x, checkpointing=self.grad_checkpointing, observe=observe)
        if size is None:
            size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        return self.norm(x), size

    def _embed(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to the tokens that are left (B, K, C), normalised."""
        _refuse_masks(attn_mask, is_causal)
        return self.forward_tokens(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None) -> Tensor:
        """Tokens to logits. Means over tokens are weighted with their sizes.

        Raises:
            ValueError: ``size`` is missing and the head needs it.
        """
        if self.global_pool == "max" and size is not None:
            x = x.masked_fill((size == 0)[..., None], -torch.inf)
        if self.global_pool in _POOLS_WITHOUT_SIZES:
            return super().forward_head(x, pre_logits)
        if size is None:
            raise ValueError(
                f"with global_pool={self.global_pool!r} a compressed model's head needs the sizes of the tokens: call "
                "model(images), or give it what model.forward_tokens(images) returns"
            )
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        x, size = x[:, first:], size[:, first:]
        if self.global_pool == "map" and size.requires_grad:
            x = _masked_attention_pool(self.attn_pool, x, size)
        elif self.global_pool == "map":
            x = self.attn_pool(x, attn_mask=size.log()[:, None, None].to(x.dtype))
        else:
            weight = (size / size.detach().sum(1, keepdim=True)).to(x.dtype)
            mean = (weight[:, None] @ x).squeeze(1)
            if self.global_pool == "avgmax":
                mean = 0.5 * (x.masked_fill((size == 0)[..., None], -torch.inf).amax(1) + mean)
            x = mean
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _refuse_masks(attn_mask, is_causal)
        tokens, size = self.forward_tokens(x)
        return self.forward_head(tokens, size=size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As of the uncompressed model, with the patches of the intermediate features back on their grid.

        A patch gets the features of the token that absorbed it; a pruned patch is zero. The final features stay
        (B, K, C).
        """
        _refuse_masks(attn_mask, is_causal)
        if self.training and isinstance(self._diffrate_plan, SearchPlan):
            raise ValueError("the search step has no intermediate features: call eval() first")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        restored: list[Tensor] = []

        def restore(tokens: Tensor, slot: Tensor) -> None:
            restored.append(ops.restore_tokens(self.norm(tokens) if norm else tokens, slot))

        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        tokens, _ = self._diffrate_plan.run(
            blocks, self._embed(x), checkpointing=self.grad_checkpointing, observe=restore
        )
        intermediates, prefixes = [], []
        for index in sorted(taken):
            features = restored[index]
            prefixes.append(features[:, : self.num_prefix_tokens])
            features = features[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                features = features.transpose(1, 2).unflatten(2, (rows, columns))
            intermediates.append(features)

        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(tokens)
            return result
        found = list(zip(intermediates, prefixes, strict=True)) if with_prefix else intermediates
        return found if intermediates_only else (self.norm(tokens), found)


class VisionTransformerAdapter(Adapter):
    """Class-token models by class attention, models without one by attention received."""

    family = "VisionTransformer"

    def knows(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def check(self, model: nn.Module) -> None:
        model = cast(VisionTransformer, model)
        cls = original_class(model)
        for method in ("forward", "forward_features", "pool"):
            if getattr(cls, method) is not getattr(VisionTransformer, method):
                raise ValueError(f"{cls.__name__} overrides VisionTransformer.{method}, which compression would bypass")
        if cls.forward_head not in (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head):
            raise ValueError(f"{cls.__name__} overrides VisionTransformer.forward_head, which compression would bypass")
        if not isinstance(model.blocks, nn.Sequential) or len(model.blocks) == 0:
            raise ValueError("the model has no blocks to compress")
        for index, block in enumerate(model.blocks):
            if not has_forward_of(block, Block, ResPostBlock):
                raise ValueError(
                    f"blocks[{index}] is a {type(block).__name__}, which is not supported: tokens are compressed "
                    "between attention and MLP, as timm's Block and ResPostBlock have them"
                )
            if not has_forward_of(block.attn, Attention):
                raise ValueError(
                    f"blocks[{index}].attn is a {type(block.attn).__name__}, which is not supported: expected timm's "
                    "Attention"
                )
        if model.global_pool == "map" and (
            not has_forward_of(model.attn_pool, AttentionPoolLatent) or model.attn_pool.pos_embed is not None
        ):
            raise ValueError("attention pooling with a position embedding is not supported: tokens lose their places")
        if model.global_pool not in (*_POOLS_WITHOUT_SIZES, "avg", "avgmax", "map"):
            raise ValueError(f"global_pool={model.global_pool!r} is not supported")

    def check_schedule(self, model: nn.Module, schedule: Schedule) -> None:
        model = cast(VisionTransformer, model)
        if model.global_pool not in ("token", "") and min(schedule.merge) <= model.num_prefix_tokens:
            raise ValueError(
                f"the schedule leaves {min(schedule.merge)} tokens, all of them prefix, but the model pools over "
                f"patches (global_pool={model.global_pool!r})"
            )

    def prefix(self, model: nn.Module) -> int:
        return cast(VisionTransformer, model).num_prefix_tokens

    def stages(self, model: nn.Module) -> tuple[Stage, ...]:
        model = cast(VisionTransformer, model)
        blocks, prefix = tuple(model.blocks), model.num_prefix_tokens
        rows, columns = model.patch_embed.grid_size
        # what the last block does reaches a class token no more, but it does reach a pool over patches
        end = len(blocks) if model.global_pool in ("token", "") else len(blocks) - 1
        compressible = tuple(0 < index < end for index in range(len(blocks)))
        return (Stage(blocks, (rows, columns), rows * columns + prefix, compressible, prefix + 1),)

    def cost(self, model: nn.Module) -> ModelCost:
        model = cast(VisionTransformer, model)
        if not has_forward_of(model.patch_embed, PatchEmbed):
            raise ValueError(
                f"the FLOPs of patch_embed, a {type(model.patch_embed).__name__}, are not known: expected PatchEmbed"
            )
        (stage,) = self.stages(model)
        blocks = tuple(
            BlockCost(
                attention=weight_count(block.attn, nn.Linear),
                pairs=2 * block.attn.num_heads * block.attn.head_dim,
                mlp=weight_count(block.mlp, nn.Linear),
            )
            for block in stage.blocks
        )
        embedding = stage.tokens * model.patch_embed.proj.weight.numel()
        # a distilled model has a second head
        head = sum(weight_count(getattr(model, name, None), nn.Linear) for name in ("head", "head_dist"))
        per_token = 0
        if model.global_pool == "map":
            pool: Any = model.attn_pool
            per_token = weight_count(pool.kv, nn.Linear) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += pool.latent_len * (weight_count(pool, nn.Linear) - weight_count(pool.kv, nn.Linear))
        return ModelCost((StageCost(stage.tokens, embedding, blocks),), head, per_token)

    def attention(self, block: Any, x: Tensor, attend: AttentionFunction) -> tuple[Tensor, Tensor, Tensor | None]:
        attn = block.attn
        normalises_after = isinstance(block, ResPostBlock)
        y = x if normalises_after else block.norm1(x)
        branch, importance = attention_of_packed_qkv(attn, y, attend)
        branch = attn.norm(branch)
        if getattr(attn, "gate", None) is not None:
            branch = branch * attn.gate(y).sigmoid()
        branch = attn.proj_drop(attn.proj(branch))
        branch = block.norm1(branch) if normalises_after else block.ls1(branch)
        return x, block.drop_path1(branch), importance

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        if isinstance(block, ResPostBlock):
            return x + block.drop_path2(block.norm2(block.mlp(x)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def compressor(self, model: nn.Module) -> BlockCompressor:
        model = cast(VisionTransformer, model)
        return BlockCompressor(self, model.num_prefix_tokens, "class" if model.has_class_token else "received")

    def compressed_parts(self, model: nn.Module) -> list[tuple[nn.Module, type[CompressedModule]]]:
        return [(model, CompressedVisionTransformer)]

    def run(self, model: nn.Module, images: Tensor, observe: Observer) -> None:
        cast(CompressedVisionTransformer, model).forward_tokens(images, observe)


def _masked_attention_pool(pool: Any, x: Tensor, size: Tensor) -> Tensor:
    """timm's attention pooling over tokens that count for their sizes, differentiable where a size is 0."""
    latent = pool.latent.expand(len(x), -1, -1)
    q = pool.q_norm(pool.q(latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2))
    k, v = pool.kv(x).unflatten(2, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (q @ pool.k_norm(k).transpose(-1, -2) * pool.scale).float()
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp() * size[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    x = pool.proj_drop(pool.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    return x.mean(1) if pool.pool == "avg" else x[:, 0] if pool.pool == "token" else x


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("a compressed model takes no attn_mask and no is_causal: restore() it first")
