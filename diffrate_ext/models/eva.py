"""timm's Eva, with rotary positions: DINOv3, EVA-02, Perception Encoder, ViTs with RoPE; and without: EVA.

As in vision_transformer.py, tokens are reduced between attention and MLP (DiffRate, section 3). Positions travel with
their tokens, and a merged token has the position of its destination.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from ..errors import InputTypeError
from .classes import CompressedModule
from .compressed import NO_STEP, Step, attention
from .rotary import RotaryPositions
from .transformer import CompressedTransformer
from .transformer_adapter import Mixins, TransformerAdapter


class CompressedEvaAttention(CompressedModule, nn.Module):
    """timm's EvaAttention or AttentionRope, whose map the step never builds."""

    norm: Any
    proj: Any
    proj_drop: Any

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        gate = getattr(self, "gate", None)
        q, k, v = _query_key_value(self, x)
        out = self.norm(attention(self, q, k, v, step))
        if gate is not None:
            out = out * gate(x).sigmoid()
        x = self.proj_drop(self.proj(out))
        return x


class CompressedEvaBlock(CompressedModule, EvaBlock):
    """timm's EvaBlock, with tokens reduced between attention and MLP."""

    @property
    def first_norm(self) -> nn.Module:
        return self.norm1

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        if step is None:
            raise InputTypeError(NO_STEP)
        branch = self.drop_path1(_scaled(self.attn(step.norm(x, self.norm1), step), self.gamma_1))
        x, normalized = step.reduce_and_norm(x, branch, self.norm2)
        return step.add(x, self.drop_path2(_scaled(self.mlp(normalized), self.gamma_2)))


class CompressedEvaBlockPostNorm(CompressedModule, EvaBlockPostNorm):
    """The same of timm's EvaBlockPostNorm, which normalises after attention and after the MLP."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        if step is None:
            raise InputTypeError(NO_STEP)
        x = step.reduce(x, self.drop_path1(self.norm1(self.attn(x, step))))
        return step.add(x, self.drop_path2(self.norm2(self.mlp(x))))


class CompressedEva(CompressedTransformer, Eva):  # type: ignore[misc]  # more arguments
    """An Eva whose blocks drop and merge tokens."""

    @property
    def _first_pooled(self) -> int:
        return 0 if self.global_pool == "map" else self.num_prefix_tokens

    def _embed(self, x: Tensor) -> tuple[Tensor, RotaryPositions | None]:
        x, embedding = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(x), None if embedding is None else self._rotary(embedding)

    def _rotary(self, embedding: Tensor) -> RotaryPositions:
        """From what timm gives to all blocks, or with one part for each block."""
        parts = embedding.unbind(0) if self.rope_mixed else (embedding,)
        # (N, 2D), (H, N, 2D), or, after patch dropout, (B, 1 or H, N, 2D)
        parts = tuple(part[(None,) * (4 - part.ndim)] for part in parts)
        return RotaryPositions(parts if self.rope_mixed else parts[0], self.num_prefix_tokens)


class EvaAdapter(TransformerAdapter):
    """An Eva with any of its blocks, and both kinds of attention."""

    family = "Eva"
    base = Eva
    heads = (Eva.forward_head,)
    compressed = CompressedEva
    block_mixins: ClassVar[Mixins] = {EvaBlock: CompressedEvaBlock, EvaBlockPostNorm: CompressedEvaBlockPostNorm}
    attention_mixins: ClassVar[Mixins] = {EvaAttention: CompressedEvaAttention, AttentionRope: CompressedEvaAttention}


def _query_key_value(attn: Any, x: Tensor) -> list[Tensor]:
    """(B, H, N, D) each. Where several heads share keys and values, these are repeated."""
    separate = (attn.q_proj, attn.k_proj, attn.v_proj)
    parts = _packed(attn, x).chunk(3, -1) if attn.qkv is not None else [projection(x) for projection in separate]
    q, k, v = (part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in parts)
    if q.shape[1] != k.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return [q, k, v]


def _packed(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values side by side (B, N, 3*H*D); EvaAttention has biases beside the layer, none for keys."""
    if getattr(attn, "q_bias", None) is None:
        packed: Tensor = attn.qkv(x)
        return packed
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x
