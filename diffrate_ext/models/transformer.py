"""Models that are one row of blocks between an embedding and a head, in timm's form: how they run compressed."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import InputValueError
from ..numeric import wide_dtype
from .classes import CompressedModule, refuse_symbolic_trace
from .compressed import Observer, Plan, run_blocks
from .dense_features import DenseFeatures, Fill
from .pooling import attention_pool, weighted_mean, without_masked
from .rotary import RotaryPositions

POOLS_CLASS_TOKEN = ("token", "")
POOLS_WITHOUT_SIZES = (*POOLS_CLASS_TOKEN, "max")
POOLS = (*POOLS_WITHOUT_SIZES, "avg", "avgmax", "map")


class CompressedTransformer(CompressedModule, nn.Module):
    """A model whose blocks drop and merge tokens.

    ``forward_features`` returns the tokens that are left, (B, K, C). ``forward_head`` needs their sizes where it
    averages or attends over patches: it finds them with the very tensor that ``forward_features`` (or
    ``forward_intermediates``) returned, or takes them from ``forward_tokens``.
    """

    _diffrate_plan: Plan

    blocks: Any
    patch_embed: Any
    norm: Any
    fc_norm: Any
    attn_pool: Any
    head_drop: Any
    head: Any
    num_prefix_tokens: int
    global_pool: Any
    grad_checkpointing: bool

    def _embed(self, x: Tensor) -> tuple[Tensor, RotaryPositions | None]:
        """Images to the tokens that enter the first block, and their rotary positions where the model has such."""
        raise NotImplementedError

    @property
    def _first_pooled(self) -> int:
        """The first token that a pool over tokens takes in."""
        raise NotImplementedError

    def forward_tokens(self, x: Tensor, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """Images to the tokens that are left (B, K, C), normalised, and their sizes (B, K), float32 (float64).

        In the search step (training mode of a :class:`RateSearch`) all N tokens are there, and masked ones have size 0.
        """
        x, size = self._run_blocks(*self._embed(x), observe=observe)
        return self.norm(x), _ones(x) if size is None else size

    def _run_blocks(
        self,
        x: Tensor,
        rotary: RotaryPositions | None,
        depth: int | None = None,
        observe: Observer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and sizes after the first ``depth`` blocks (all). None: all sizes are 1, and nothing was masked."""
        steps = self._diffrate_plan.steps(x.shape[1], self.training)
        blocks = list(self.blocks)[:depth]
        x, state = run_blocks(blocks, x, steps, rotary=rotary, checkpointing=self.grad_checkpointing, observe=observe)
        return x, state.weights

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to the tokens that are left (B, K, C), normalised."""
        _check_call(x, attn_mask, is_causal)
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
        self._check_pooled(x)
        if self.global_pool == "max" and size is not None:
            x = without_masked(x, size)
        if self.global_pool in POOLS_WITHOUT_SIZES:
            return super().forward_head(x, pre_logits)  # type: ignore[misc]
        if size is None:
            raise InputValueError(
                f"with global_pool={self.global_pool!r} a compressed model's head needs the sizes of the tokens, and x "
                "is not the tensor that forward_features returned: use tokens, size = model.forward_tokens(images) and "
                "model.forward_head(tokens, size=size)"
            )
        x, size = x[:, self._first_pooled :], size[:, self._first_pooled :]
        if self.global_pool == "map":
            x = attention_pool(self.attn_pool, x, size)
        elif self.global_pool == "avgmax":
            x = 0.5 * (without_masked(x, size).amax(1) + weighted_mean(x, size))
        else:
            x = weighted_mean(x, size)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def _check_pooled(self, x: Tensor) -> None:
        if self.global_pool not in POOLS_CLASS_TOKEN and x.shape[1] <= self._first_pooled:
            raise InputValueError(
                f"global_pool={self.global_pool!r} pools over patches, but the schedule leaves none: {x.shape[1]} "
                f"tokens, {self.num_prefix_tokens} of them prefix"
            )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        _check_call(x, attn_mask, is_causal)
        x, size = self._run_blocks(*self._embed(x))
        x = self.norm(x)
        if size is not None:
            return self.forward_head(x, size=size)
        self._check_pooled(x)
        logits: Tensor = super().forward_head(x)  # type: ignore[misc]  # the model's own, which sums in another order
        return logits

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **options: Any) -> None:
        """As of the uncompressed model.

        Raises:
            InputValueError: the new pool is over patches, and the schedule leaves none.
        """
        left = self._diffrate_plan.fewest_left
        if global_pool not in (None, *POOLS_CLASS_TOKEN) and left is not None and left <= self.num_prefix_tokens:
            raise InputValueError(
                f"global_pool={global_pool!r} pools over patches, but the schedule leaves none: {left} tokens, "
                f"{self.num_prefix_tokens} of them prefix. restore() the model first"
            )
        super().reset_classifier(num_classes, global_pool, **options)  # type: ignore[misc]

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
        _check_call(x, attn_mask, is_causal)
        if self.training and self._diffrate_plan.masks_in_training:
            raise InputValueError("the search step has no intermediate features: call eval() first")
        if output_fmt not in ("NCHW", "NLC"):
            raise InputValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        embedded, rotary = self._embed(x)
        dense = DenseFeatures(embedded, (rows, columns), fill, self.norm if norm else None, taken)
        tokens, size = self._run_blocks(embedded, rotary, last + 1 if stop_early else None, dense.add)
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


def _ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=wide_dtype(x), device=x.device)


def _with_sizes(tokens: Tensor, size: Tensor | None) -> Tensor:
    """Tokens that bring their sizes with them, for ``forward_head``."""
    if not torch.compiler.is_compiling():
        tokens._diffrate_size = _ones(tokens) if size is None else size  # type: ignore[attr-defined]
    return tokens


def _check_call(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    refuse_symbolic_trace(x)
    if attn_mask is not None or is_causal:
        raise InputValueError("a compressed model takes no attn_mask and no is_causal: restore() it first")
