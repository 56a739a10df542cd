"""The whole-model rival: a timm Vision Transformer with token compression as eager PyTorch with attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import rivals
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffrate_ext import Schedule


class AttentionOperator(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, scale: float | None, prefix: int
    ) -> tuple[Tensor, Tensor | None]: ...


class PruneMergeOperator(Protocol):
    def __call__(
        self, x: Tensor, attn: Tensor, k_p: int, k_m: int, size: Tensor | None = None, *, prefix: int
    ) -> tuple[Tensor, ...]: ...


class EagerCompressed(nn.Module):
    """A class-token ViT of timm that computes attention maps, reads the class rows off them, and compresses.

    Shares the weights of ``model``. Blocks that remove nothing are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        attention: AttentionOperator,
        prune_merge: PruneMergeOperator,
    ) -> None:
        super().__init__()
        vit: Any = model
        if vit.cls_token is None:
            raise ValueError("the eager rival needs a model with a class token")
        self.model = vit
        self.attention = attention
        self.prune_merge = prune_merge
        self.prefix: int = vit.num_prefix_tokens
        self.kept_numbers = schedule.kept_numbers(vit.patch_embed.num_patches + self.prefix)

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        x = embed(model, images)
        size: Tensor | None = None
        for block, (k_p, k_m) in zip(model.blocks, self.kept_numbers, strict=True):
            attended, importance = self.attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(attended))
            if k_m < x.shape[1]:
                x, size, _ = self.prune_merge(x, importance, k_p, k_m, size, prefix=self.prefix)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return classify(model, model.norm(x), size)

    def attend(self, attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out, importance = self.attention(
            attn.q_norm(q), attn.k_norm(k), v, size, scale=float(attn.scale), prefix=self.prefix
        )
        assert importance is not None
        return attn.proj(out.transpose(1, 2).reshape(batch, tokens, -1)), importance


def embed(model: Any, images: Tensor) -> Tensor:
    """Images to the tokens that enter the first block (B, N, C)."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def classify(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    """Tokens (B, K, C), normalised, and their sizes (B, K) to logits."""
    if model.global_pool == "token":
        pooled = x[:, 0]
    elif model.global_pool == "avg":
        prefix = model.num_prefix_tokens
        patches = x[:, prefix:]
        if size is None:
            pooled = patches.mean(1)
        else:
            weight = size[:, prefix:, None].to(x.dtype)
            pooled = (patches * weight).sum(1) / weight.sum(1)
    else:
        raise ValueError(f"the rival pools 'token' or 'avg', not {model.global_pool!r}")
    return model.head(model.head_drop(model.fc_norm(pooled)))


def compress_eager(model: nn.Module, schedule: Schedule) -> EagerCompressed:
    """The rival of ``diffrate_ext.compress``: same results, shares the weights, leaves ``model`` as it is."""
    return EagerCompressed(model, schedule, rivals.proportional_attention, rivals.prune_merge_tuned)
