"""timm's VisionTransformer: DeiT, AugReg, DINOv2, CLIP, SigLIP, MAE and others.

``CompressedVisionTransformer`` runs the blocks, ``CompressedBlock`` is one of them; both as timm has them, with tokens
reduced between attention and MLP (DiffRate, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..costs import BlockCost, ModelCost, StageCost
from ..errors import InputTypeError, InputValueError
from ..modes import is_traced
from ..numeric import TINY, wide_dtype
from ..schedule import Schedule
from .adapter import Adapter, Stage, TokenRules, linear_weights
from .classes import CompressedModule, has_forward_of, original_class, unwrapped
from .compressed import NO_STEP, Observer, Plan, Step, packed_attention, run_blocks
from .dense_features import DenseFeatures, Fill
from .patch_embedding import is_tiled

_POOLS_CLASS_TOKEN = ("token", "")
_POOLS_WITHOUT_SIZES = (*_POOLS_CLASS_TOKEN, "max")
_ADDS_POSITIONS = (VisionTransformer._pos_embed, VisionTransformerDistilled._pos_embed)
_BATCH_FOR_ONE_PASS = 8
"""From so many images on, memory traffic counts for more than launches."""


class CompressedAttention(CompressedModule, Attention):
    """timm's Attention, whose map the step never builds."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        out = self.norm(packed_attention(self, x, step))
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class CompressedBlock(CompressedModule, Block):
    """timm's Block, with tokens reduced between attention and MLP."""

    @property
    def first_norm(self) -> nn.Module:
        return self.norm1

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        if step is None:
            raise InputTypeError(NO_STEP)
        branch = self.drop_path1(self.ls1(self.attn(step.norm(x, self.norm1), step)))
        x, normalized = step.reduce_and_norm(x, branch, self.norm2)
        return step.add(x, self.drop_path2(self.ls2(self.mlp(normalized))))


class CompressedResPostBlock(CompressedModule, ResPostBlock):
    """The same of timm's ResPostBlock, which normalises after attention and after the MLP."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        if step is None:
            raise InputTypeError(NO_STEP)
        x = step.reduce(x, self.drop_path1(self.norm1(self.attn(x, step))))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class CompressedVisionTransformer(CompressedModule, VisionTransformer):
    """A VisionTransformer whose blocks drop and merge tokens.

    ``forward_features`` returns the tokens that are left, (B, K, C). ``forward_head`` needs their sizes where it
    averages or attends over patches: it finds them with the very tensor that ``forward_features`` (or
    ``forward_intermediates``) returned, or takes them from ``forward_tokens``.
    """

    _diffrate_plan: Plan

    def forward_tokens(self, x: Tensor, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Images to the tokens that are left (B, K, C), normalised, and their sizes (B, K), float32 (float64).

        In the search step (training mode of a :class:`RateSearch`) all N tokens are there, and masked ones have size 0.
        """
        x, size = self._run_blocks(self._embed(x), observe=observe)
        return self.norm(x), size

    def _embed(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """As timm's, which writes all tokens twice: once beside the prefix, once with their positions."""
        in_one_pass = (
            not (self.training or torch.is_grad_enabled() or is_traced())
            and not (self.pos_drop._forward_hooks or self.pos_drop._forward_pre_hooks)
            and x.shape[0] >= _BATCH_FOR_ONE_PASS
            and self.num_prefix_tokens > 0
            and original_class(self)._pos_embed in _ADDS_POSITIONS
        )
        if not in_one_pass:
            return super()._pos_embed(x)
        added = super()._pos_embed(x.new_zeros((1, *x.shape[1:])))  # prefix and positions
        tokens = added.new_empty((x.shape[0], *added.shape[1:]))
        tokens[:, : self.num_prefix_tokens] = added[:, : self.num_prefix_tokens]
        patches = tokens[:, self.num_prefix_tokens :]
        torch.add(x.view_as(patches), added[:, self.num_prefix_tokens :], out=patches)
        return tokens

    def _run_blocks(
        self, x: Tensor, depth: int | None = None, observe: Observer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and sizes after the first ``depth`` blocks (all)."""
        steps = self._diffrate_plan.steps(x.shape[1], self.training)
        blocks = list(self.blocks)[:depth]
        x, state = run_blocks(blocks, x, steps, checkpointing=self.grad_checkpointing, observe=observe)
        if state.size is None:
            return x, torch.ones(x.shape[:2], dtype=wide_dtype(x), device=x.device)
        return x, state.size.clamp_min(TINY) if state.mask is None else state.size * state.mask

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to the tokens that are left (B, K, C), normalised."""
        _refuse_masks(attn_mask, is_causal)
        return _with_sizes(*self.forward_tokens(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False, size: Tensor | None = None) -> Tensor:
        """Tokens to logits. Means over tokens are weighted with their sizes.

        Args:
            x: tokens (B, K, C), as ``forward_features`` or ``forward_tokens`` returns them.
            size: their sizes (B, K). None: those that ``forward_features`` left with ``x``.

        Raises:
            InputValueError: the head needs the sizes and there are none, or pools over patches and there are none.
        """
        if size is None:
            size = getattr(x, "_diffrate_size", None)
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.global_pool not in _POOLS_CLASS_TOKEN and x.shape[1] <= first:
            raise InputValueError(
                f"global_pool={self.global_pool!r} pools over patches, but the schedule leaves none: {x.shape[1]} "
                f"tokens, {self.num_prefix_tokens} of them prefix"
            )
        if self.global_pool == "max" and size is not None:
            x = x.masked_fill((size == 0)[..., None], -torch.inf)
        if self.global_pool in _POOLS_WITHOUT_SIZES:
            return super().forward_head(x, pre_logits)
        if size is None:
            raise InputValueError(
                f"with global_pool={self.global_pool!r} a compressed model's head needs the sizes of the tokens, and x "
                "is not the tensor that forward_features returned: use tokens, size = model.forward_tokens(images) and "
                "model.forward_head(tokens, size=size)"
            )
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
        fill: Fill = "last",
    ) -> Any:
        """As of the uncompressed model, with the patches of the intermediate features back on their grid.

        A patch gets the features of the token that absorbed it. The final features stay (B, K, C).

        Args:
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict: as of the
                uncompressed model.
            fill: what a pruned patch gets: with ``"last"`` the features that it had when it was pruned (what the last
                block before returned), with ``"nearest"`` those of the nearest patch that is left, or ``"zeros"``.

        Raises:
            InputValueError: the model is in its search step, or an argument is not known.
        """
        _refuse_masks(attn_mask, is_causal)
        if self.training and self._diffrate_plan.masks_in_training:
            raise InputValueError("the search step has no intermediate features: call eval() first")
        if output_fmt not in ("NCHW", "NLC"):
            raise InputValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        embedded = self._embed(x)
        dense = DenseFeatures(embedded, (rows, columns), fill, self.norm if norm else None, taken)
        tokens, size = self._run_blocks(embedded, last + 1 if stop_early else None, dense.add)
        intermediates, prefixes = [], []
        for index in sorted(taken):
            features = dense.blocks[index]
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
                result["image_features"] = _with_sizes(self.norm(tokens), size)
            return result
        found = list(zip(intermediates, prefixes, strict=True)) if with_prefix else intermediates
        return found if intermediates_only else (_with_sizes(self.norm(tokens), size), found)


class VisionTransformerAdapter(Adapter):
    """Class-token models by class attention, models without one by attention received."""

    family = "VisionTransformer"
    model: VisionTransformer

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def _check(self) -> None:
        model, cls = self.model, original_class(self.model)
        for method in ("forward", "forward_features", "pool"):
            if getattr(cls, method) is not getattr(VisionTransformer, method):
                raise InputValueError(
                    f"{cls.__name__} overrides VisionTransformer.{method}, which compression would bypass"
                )
        if cls.forward_head not in (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head):
            raise InputValueError(
                f"{cls.__name__} overrides VisionTransformer.forward_head, which compression would bypass"
            )
        if not isinstance(model.blocks, nn.Sequential) or len(model.blocks) == 0:
            raise InputValueError("the model has no blocks to compress")
        for index, block in enumerate(self._blocks):
            if not has_forward_of(block, Block, ResPostBlock):
                raise InputValueError(
                    f"blocks[{index}] is a {type(block).__name__}, which is not supported: tokens are compressed "
                    "between attention and MLP, as timm's Block and ResPostBlock have them"
                )
            if not has_forward_of(block.attn, Attention):
                raise InputValueError(
                    f"blocks[{index}].attn is a {type(block.attn).__name__}, which is not supported: expected timm's "
                    "Attention"
                )
        if model.global_pool == "map" and (
            not has_forward_of(model.attn_pool, AttentionPoolLatent) or model.attn_pool.pos_embed is not None
        ):
            raise InputValueError(
                "attention pooling with a position embedding is not supported: tokens lose their places"
            )
        if model.global_pool not in (*_POOLS_WITHOUT_SIZES, "avg", "avgmax", "map"):
            raise InputValueError(f"global_pool={model.global_pool!r} is not supported")

    def check_schedule(self, schedule: Schedule) -> None:
        fewest = min(schedule.after_merging)
        if self.model.global_pool not in _POOLS_CLASS_TOKEN and fewest <= self.model.num_prefix_tokens:
            raise InputValueError(
                f"the schedule leaves {fewest} tokens, all of them prefix, but the model pools over patches "
                f"(global_pool={self.model.global_pool!r})"
            )

    @property
    def rules(self) -> TokenRules:
        return TokenRules(self.model.num_prefix_tokens, "class" if self.model.has_class_token else "received")

    @property
    def stages(self) -> tuple[Stage, ...]:
        blocks, prefix = self._blocks, self.model.num_prefix_tokens
        rows, columns = self.model.patch_embed.grid_size
        # what the last block does reaches a class token no more, but it does reach a pool over patches
        end = len(blocks) if self.model.global_pool in _POOLS_CLASS_TOKEN else len(blocks) - 1
        compressible = tuple(0 < index < end for index in range(len(blocks)))
        return (Stage(self.model, blocks, (rows, columns), rows * columns + prefix, compressible, prefix + 1),)

    @property
    def cost(self) -> ModelCost:
        model: Any = self.model
        if not has_forward_of(model.patch_embed, PatchEmbed):
            raise InputValueError(
                f"the FLOPs of patch_embed, a {type(model.patch_embed).__name__}, are not known: expected PatchEmbed"
            )
        (stage,) = self.stages
        blocks = tuple(
            BlockCost(
                attention=linear_weights(block.attn),
                pairs=2 * block.attn.num_heads * block.attn.head_dim,
                mlp=linear_weights(block.mlp),
            )
            for block in stage.blocks
        )
        embedding = stage.tokens * model.patch_embed.proj.weight.numel()
        # a distilled model has a second head
        head = sum(linear_weights(getattr(model, name, None)) for name in ("head", "head_dist"))
        per_token = 0
        if model.global_pool == "map":
            pool = model.attn_pool
            per_token = linear_weights(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += pool.latent_len * (linear_weights(pool) - linear_weights(pool.kv))
        return ModelCost((StageCost(stage.tokens, embedding, blocks),), head, per_token)

    @property
    def _blocks(self) -> tuple[Any, ...]:
        return tuple(unwrapped(block) for block in self.model.blocks)

    @property
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        replaced: list[tuple[nn.Module, type[CompressedModule]]] = [(self.model, CompressedVisionTransformer)]
        for block in self._blocks:
            mixin = CompressedBlock if has_forward_of(block, Block) else CompressedResPostBlock
            replaced += [(block, mixin), (block.attn, CompressedAttention)]  # type: ignore[list-item]
        return replaced

    @property
    def patch_convolutions(self) -> list[nn.Module]:
        projection: Any = getattr(self.model.patch_embed, "proj", None)
        return [projection] if is_tiled(projection) else []

    def observe(self, images: Tensor, observe: Observer) -> None:
        assert isinstance(self.model, CompressedVisionTransformer)
        self.model.forward_tokens(images, observe)


def _masked_attention_pool(pool: Any, x: Tensor, size: Tensor) -> Tensor:
    """timm's attention pooling over tokens that count for their sizes, differentiable where a size is 0."""
    latent = pool.latent.expand(len(x), -1, -1)
    q = pool.q_norm(pool.q(latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2))
    k, v = pool.kv(x).unflatten(2, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ pool.k_norm(k).transpose(-1, -2) * pool.scale
    logits = logits.to(wide_dtype(logits))
    weights = (logits - logits.detach().amax(-1, keepdim=True)).exp() * size[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    x = pool.proj_drop(pool.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    return x.mean(1) if pool.pool == "avg" else x[:, 0] if pool.pool == "token" else x


def _with_sizes(tokens: Tensor, size: Tensor) -> Tensor:
    """Tokens that bring their sizes with them, for ``forward_head``."""
    if not torch.compiler.is_compiling():
        tokens._diffrate_size = size  # type: ignore[attr-defined]
    return tokens


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise InputValueError("a compressed model takes no attn_mask and no is_causal: restore() it first")
