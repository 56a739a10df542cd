"""timm's VisionTransformer: DeiT, AugReg, DINOv2, CLIP, SigLIP, MAE and others.

``CompressedVisionTransformer`` runs the blocks, ``CompressedBlock`` is one of them; both as timm has them, with tokens
reduced between attention and MLP (DiffRate, section 3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..errors import InputTypeError
from ..modes import is_traced
from .classes import CompressedModule, original_class
from .compressed import NO_STEP, Step, packed_attention
from .transformer import CompressedTransformer
from .transformer_adapter import Mixins, TransformerAdapter

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
        return step.add(x, self.drop_path2(self.norm2(self.mlp(x))))


class CompressedVisionTransformer(CompressedTransformer, VisionTransformer):
    """A VisionTransformer whose blocks drop and merge tokens."""

    @property
    def _first_pooled(self) -> int:
        return 0 if self.pool_include_prefix else self.num_prefix_tokens

    def _embed(self, x: Tensor) -> tuple[Tensor, None]:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x)), None

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


class VisionTransformerAdapter(TransformerAdapter):
    """A VisionTransformer with any of timm's usual blocks."""

    family = "VisionTransformer"
    base = VisionTransformer
    heads = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
    compressed = CompressedVisionTransformer
    block_mixins: ClassVar[Mixins] = {Block: CompressedBlock, ResPostBlock: CompressedResPostBlock}
    attention_mixins: ClassVar[Mixins] = {Attention: CompressedAttention}
