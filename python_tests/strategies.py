"""Inputs of the operators, for hypothesis.

A case is a small frozen description (its ``repr`` is what a failing test prints); its methods make the tensors from it,
the same ones every time. One module for all operators, so that every operator meets every shape, dtype, layout and kind
of value. Values are drawn on the CPU and laid out on the device: copying a tensor to another device closes the gaps in
its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import Tensor

TOKENS = (1, 2, 3, 17, 64, 65, 129, 197, 257, 577, 1025)
CHANNELS = (1, 3, 8, 16, 37, 64, 65, 384)
HEAD_DIMS = (1, 3, 8, 16, 33, 64, 80, 128)
IMAGES = (1, 2, 3, 5, 0)
PREFIXES = (1, 0, 2, 5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TOKEN_LAYOUTS = ("contiguous", "transposed", "sliced", "every second channel", "batch second", "expanded batch")
HEAD_LAYOUTS = ("contiguous", "packed qkv", "tokens before heads", "transposed", "expanded batch")
FEATURES = ("normal", "codebook", "duplicates", "clustered", "zero rows", "NaN", "large", "tiny")
IMPORTANCES = ("random", "ties", "equal", "signed zeros", "NaN", "all NaN", "infinite", "negative", "any bits")
SIZES = (None, "ones", "random", "extreme")
MASKS = ("random", "ones", "prefix only", "one image empty", "fractional")
MOST_ELEMENTS = 150_000  # of x: large shapes are met, but not all extents are large at once
CPU = torch.device("cpu")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of importances and sizes beside features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, N, C) in another memory layout; what lies between them is NaN, so that reading it shows."""
    images, tokens, channels = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch second":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded batch":
        return x[:1].expand_as(x)
    gap = 2 if layout == "every second channel" else 1
    around = x.new_full((images, tokens + 3, channels * gap + 5), torch.nan)
    inside = around[:, 1 : tokens + 1, 2 : 2 + channels * gap : gap]
    return inside.copy_(x)


def lay_out_heads(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The values of q, k, v (B, H, N, D) in another memory layout; "packed qkv" is what timm's attention makes."""
    if layout == "contiguous":
        return [tensor.contiguous() for tensor in tensors]
    if layout == "packed qkv":
        images, heads, tokens, channels = tensors[0].shape
        packed = tensors[0].new_empty(images, tokens, len(tensors), heads, channels)
        views = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return [view.copy_(tensor) for view, tensor in zip(views, tensors, strict=True)]
    if layout == "tokens before heads":
        return [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    if layout == "transposed":
        return [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in tensors]
    return [tensor[:1].expand_as(tensor) for tensor in tensors]


def make_features(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    rows = shape[:2]
    if kind == "codebook":  # rows that are equal up to a power of two: their cosines tie
        code = torch.randint(-2, 3, (3, shape[2]), generator=random).double()
        x = code[torch.randint(3, rows, generator=random)]
        x = x * 2.0 ** torch.randint(-1, 2, (*rows, 1), generator=random)
    elif kind == "duplicates":  # three rows that many others are equal to, bit for bit
        originals = torch.randn(3, shape[2], generator=random, dtype=torch.float64)
        copies = originals[torch.randint(3, rows, generator=random)]
        x = torch.where(torch.rand((*rows, 1), generator=random) < 0.6, copies, x)
    elif kind == "clustered":
        x = 0.05 * x + torch.randn(shape[2], generator=random, dtype=torch.float64)
    elif kind == "zero rows":
        x[torch.rand(rows, generator=random) < 0.4] = 0
    elif kind == "NaN":
        x = torch.where(torch.rand(shape, generator=random) < 0.3 / max(shape[2], 1), torch.nan, x)
    elif kind == "large":
        x = x * 1e3
    elif kind == "tiny":  # norms below the cosine's epsilon
        x = x * (1e-6 if dtype == torch.float16 else 1e-14)
    return x.to(dtype)


def make_importance(kind: str, shape: tuple[int, int], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    values = torch.rand(shape, generator=random, dtype=torch.float64)
    some = torch.rand(shape, generator=random) < 0.3
    if kind == "ties":
        values = torch.randint(4, shape, generator=random) / 4
    elif kind == "equal":
        values = torch.full(shape, 0.25)
    elif kind == "signed zeros":
        values = torch.where(some, -0.0, torch.where(values < 0.5, 0.0, values))
    elif kind == "NaN":
        values = torch.where(some, torch.nan, values)
    elif kind == "all NaN":
        values = torch.full(shape, torch.nan)
    elif kind == "infinite":
        values = torch.where(some, torch.inf, torch.where(values < 0.3, -torch.inf, values))
        values = torch.where(torch.rand(shape, generator=random) < 0.1, torch.nan, values)
    elif kind == "negative":
        values = torch.randn(shape, generator=random, dtype=torch.float64)
    elif kind == "any bits":  # subnormal numbers, infinities, NaN of both signs with any payload
        bits = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int64)
        values = bits.to(torch.int32).view(torch.float32)
    return values.to(dtype)


def make_size(kind: str | None, shape: tuple[int, int], dtype: torch.dtype, random: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    values = torch.ones(shape, dtype=torch.float64)
    if kind == "random":
        values = 1 + 4 * torch.rand(shape, generator=random, dtype=torch.float64)
    elif kind == "extreme":
        choices = torch.tensor([0.0, -0.0, -3.0, 1e-30, 1e30, 1.0, 2.5], dtype=torch.float64)
        values = choices[torch.randint(len(choices), shape, generator=random)]
    return values.to(dtype)


def make_mask(kind: str, shape: tuple[int, int], prefix: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Which tokens are alive (B, N): the prefix always is, but for the last image of "one image empty"."""
    values = torch.rand(shape, generator=random, dtype=torch.float64)
    if kind == "ones":
        values = torch.ones(shape)
    elif kind == "prefix only":
        values = torch.zeros(shape)
    elif kind != "fractional":
        values = (values < 0.6).double()
    values[:, :prefix] = 1
    if kind == "one image empty":
        values[-1:] = 0
    return values.to(dtype)


@dataclass(frozen=True)
class TokenCase:
    """Features (B, N, C) with importance and size."""

    images: int
    tokens: int
    channels: int
    prefix: int
    dtype: torch.dtype
    layout: str = "contiguous"
    features: str = "normal"
    importances: str = "random"
    importance_dtype: torch.dtype = torch.float32
    importance_of_prefix: bool = False  # importance comes as (B, N) instead of (B, N-P)
    sizes: str | None = None
    seed: int = 0

    def _random(self, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 16 + salt)

    @property
    def wide(self) -> torch.dtype:
        return wide(self.dtype)

    def x(self, device: torch.device = CPU, *, salt: int = 0) -> Tensor:
        shape = (self.images, self.tokens, self.channels)
        return lay_out(make_features(self.features, shape, self.dtype, self._random(salt)).to(device), self.layout)

    def importance(self, device: torch.device = CPU) -> Tensor:
        columns = self.tokens if self.importance_of_prefix else self.tokens - self.prefix
        values = make_importance(self.importances, (self.images, columns), self.importance_dtype, self._random(1))
        values = values.to(device)
        # stored transposed: the last stride is not 1
        return values.t().contiguous().t() if self.seed % 2 else values

    def patch_importance(self, importance: Tensor) -> Tensor:
        """What the operators read (B, N-P) of importance that comes as (B, N-P) or (B, N)."""
        return importance[:, importance.shape[1] - (self.tokens - self.prefix) :].to(self.wide)

    def size(self, device: torch.device = CPU) -> Tensor | None:
        values = make_size(self.sizes, (self.images, self.tokens), self.wide, self._random(2))
        return None if values is None else values.to(device)

    def plain_size(self) -> Tensor:
        """Ones where there is no size."""
        values = self.size()
        return torch.ones(self.images, self.tokens, dtype=self.wide) if values is None else values

    def gradient(self, tokens: int, device: torch.device = CPU) -> Tensor:
        shape = (self.images, tokens, self.channels)
        return make_features("normal", shape, self.dtype, self._random(3)).to(device)


seeds = st.integers(0, 999)


@st.composite
def token_cases(draw: st.DrawFn, features: Sequence[str] = FEATURES, least_tokens: int = 1) -> TokenCase:
    tokens = draw(st.sampled_from([n for n in TOKENS if n >= least_tokens]))
    images = draw(st.sampled_from(IMAGES))
    channels = draw(st.sampled_from([c for c in CHANNELS if max(images, 1) * tokens * c <= MOST_ELEMENTS]))
    dtype = draw(st.sampled_from(DTYPES))
    return TokenCase(
        images=images,
        tokens=tokens,
        channels=channels,
        prefix=draw(st.sampled_from([p for p in PREFIXES if p <= tokens])),
        dtype=dtype,
        layout=draw(st.sampled_from(TOKEN_LAYOUTS)),
        features=draw(st.sampled_from(list(features))),
        importances=draw(st.sampled_from(IMPORTANCES)),
        importance_dtype=draw(st.sampled_from([wide(dtype), *DTYPES])),
        importance_of_prefix=draw(st.booleans()),
        sizes=draw(st.sampled_from(SIZES)),
        seed=draw(seeds),
    )


@st.composite
def kept_numbers(draw: st.DrawFn, tokens: int, prefix: int) -> tuple[int, int]:
    """Any legal (k_p, k_m); the extreme ones often."""
    equal = [(prefix, prefix), (tokens, tokens), (draw(st.integers(prefix, tokens)),) * 2]
    if tokens < prefix + 2:  # no two patches, so nothing to merge
        return draw(st.sampled_from(equal))
    k_m = draw(st.integers(prefix + 1, tokens - 1))
    k_p = draw(st.integers(k_m + 1, tokens))
    merging = [(k_p, k_m), (tokens, prefix + 1), (tokens, k_m), (k_m + 1, k_m), (tokens, tokens - 1)]
    return draw(st.sampled_from([*merging, *equal]))


@dataclass(frozen=True)
class AttentionCase:
    """Queries, keys and values (B, H, N, D) with size."""

    images: int
    heads: int
    tokens: int
    head_dim: int
    prefix: int
    dtype: torch.dtype
    layout: str = "contiguous"
    sizes: str | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def qkv(self, device: torch.device = CPU) -> list[Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        shape = (self.images, self.heads, self.tokens, self.head_dim)
        values = [torch.randn(shape, generator=random).to(self.dtype).to(device) for _ in range(3)]
        return lay_out_heads(values, self.layout)

    def size(self, device: torch.device = CPU) -> Tensor | None:
        random = torch.Generator().manual_seed(self.seed + 1)
        values = make_size(self.sizes, (self.images, self.tokens), wide(self.dtype), random)
        return None if values is None else values.to(device)

    def mask(self, kind: str, device: torch.device = CPU) -> Tensor:
        random = torch.Generator().manual_seed(self.seed + 2)
        return make_mask(kind, (self.images, self.tokens), self.prefix, wide(self.dtype), random).to(device)

    def gradient(self, device: torch.device = CPU) -> Tensor:
        shape = (self.images, self.heads, self.tokens, self.head_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 3)).to(self.dtype).to(device)


@st.composite
def attention_cases(draw: st.DrawFn, least_prefix: int = 0, most_tokens: int = TOKENS[-1]) -> AttentionCase:
    tokens = draw(st.sampled_from([n for n in TOKENS if n <= most_tokens]))
    images = draw(st.sampled_from(IMAGES if tokens < 500 else (1, 2)))
    dtype = draw(st.sampled_from(DTYPES))
    widest = 64 if dtype == torch.float64 else 128  # as wide as the CUDA kernels take them
    return AttentionCase(
        images=images,
        heads=draw(st.sampled_from((1, 2, 3, 6) if tokens < 500 else (1, 2))),
        tokens=tokens,
        head_dim=draw(st.sampled_from([d for d in HEAD_DIMS if d <= widest])),
        prefix=draw(st.sampled_from([p for p in PREFIXES if least_prefix <= p <= tokens])),
        dtype=dtype,
        layout=draw(st.sampled_from(HEAD_LAYOUTS)),
        sizes=draw(st.sampled_from(SIZES)),
        scale=draw(st.sampled_from((None, None, 1.0, -0.3, 4.0))),
        seed=draw(seeds),
    )
