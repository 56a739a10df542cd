"""ToMe ("Token Merging: Your ViT But Faster", ICLR 2023) in eager PyTorch, with fused attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rival_model import classify, embed
from torch import Tensor, nn

from diffrate_ext import Schedule, flops


class ToMe(nn.Module):
    """A class-token ViT of timm in which every block merges ``r`` tokens. Shares the weights of ``model``."""

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__()
        self.model: Any = model
        self.r = r

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x = embed(model, images)
        size: Tensor | None = None
        for block in model.blocks:
            attended, keys = self.attend(block.attn, block.norm1(x), size)
            x = x + block.drop_path1(block.ls1(attended))
            x, size = merge(x, keys, size, self.r)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return classify(model, model.norm(x), None if size is None else size[..., 0])

    def attend(self, attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """The branch (B, N, C), and the mean of the keys over heads (B, N, D)."""
        qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = None if size is None else size.log()[:, None, None, :, 0]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=float(attn.scale))
        return attn.proj(out.transpose(1, 2).flatten(2)), k.mean(1)


def merge(x: Tensor, keys: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching: tokens at even positions into those at odd ones, the ``r`` most similar of them.

    Returns:
        tokens (B, N-r, C), those at even positions first, and their sizes (B, N-r, 1).
    """
    r = min(r, (x.shape[1] - 1) // 2)
    if r <= 0:
        return x, size
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token stays
    best, match = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged, kept = order[:, :r, None], order[:, r:].sort(-1).values[..., None]
    to = match.gather(1, merged[..., 0])[..., None]
    size = torch.ones_like(x[..., :1]) if size is None else size

    def reduced(tokens: Tensor) -> Tensor:
        channels = (-1, -1, tokens.shape[-1])
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        sources = even.gather(1, merged.expand(channels))
        return torch.cat([even.gather(1, kept.expand(channels)), odd.scatter_add(1, to.expand(channels), sources)], 1)

    total = reduced(size)
    return reduced(x * size) / total, total


def tome_of_flops(model: nn.Module, most: float) -> ToMe:
    """ToMe with the smallest ``r`` that takes at most so many FLOPs."""
    vit: Any = model
    tokens = vit.patch_embed.num_patches + 1
    for r in range(tokens):
        left = [tokens]
        for _ in vit.blocks:
            left.append(left[-1] - max(min(r, (left[-1] - 1) // 2), 0))
        if flops(model, Schedule(None, left[1:], prefix=1)) <= most:
            return ToMe(model, r).eval()
    raise ValueError(f"no r brings the model down to {most / 1e9:.1f} GFLOPs")
