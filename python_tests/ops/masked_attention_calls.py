"""Calls of masked_attention for its tests, and the magnitudes that its results are judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from strategies import MASKS, AttentionCase, attention_cases, wide
from torch import Tensor

from diffrate_ext import reference

TINY = torch.finfo(torch.float32).tiny


@st.composite
def calls(draw: st.DrawFn, most_tokens: int = 1025) -> tuple[AttentionCase, str, str]:
    """A case, the kind of its mask, and what importance is."""
    importance_from = draw(st.sampled_from(["class", "received"]))
    case = draw(attention_cases(least_prefix=importance_from == "class", most_tokens=most_tokens))
    return case, draw(st.sampled_from(MASKS)), importance_from


def reference_of(
    case: AttentionCase, importance_from: str, mask_gradient: str = "derivative"
) -> Callable[..., tuple[Tensor, Tensor]]:
    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": case.scale, "prefix": case.prefix, "importance_from": importance_from}
        options["mask_gradient"] = mask_gradient
        return reference.masked_attention(q, k, v, mask, size, **options)

    return compute


class Magnitudes:
    """Magnitudes of all that is rounded on the way to a result, for the tolerance.

    A logit is as uncertain as its terms are large; an uncertain logit moves its exponential by as much. Only results
    are rounded to half precision.
    """

    def __init__(self, case: AttentionCase, q: Tensor, k: Tensor, mask: Tensor, size: Tensor | None) -> None:
        self.case = case
        self.q, self.k, mask = q.double().abs(), k.double().abs(), mask.double()[:, None, None]
        logits = (q.double() @ k.double().transpose(-1, -2)) * case.logit_scale
        terms = self.q @ self.k.transpose(-1, -2) * abs(case.logit_scale)
        if size is not None:
            log_size = size.double().clamp_min(TINY).log()[:, None, None]
            logits, terms = logits + log_size, terms + log_size.abs()
        own = torch.eye(case.tokens, dtype=torch.float64)
        seen = mask + (1 - mask) * own
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        total = (e * seen).sum(-1, keepdim=True) + reference.MASKED_EPSILON
        self.uncertainty = 1 + terms + terms.amax(-1, keepdim=True)
        self.attn = (e * seen + reference.MASKED_EPSILON / case.tokens) / total
        self.seen, self.shown = e * seen / total, e / total * (1 - own)
        self.weaker = 1 / (1 + (1 - mask) * self.shown)  # the mask's gradient as a difference
        self.alive = mask.transpose(-1, -2)

    def narrow(self, result: Tensor, terms: Tensor) -> Tensor:
        """Of a result in the features' dtype, of which ``terms`` are rounded in the wide one."""
        return result.abs() + terms * (torch.finfo(wide(self.case.dtype)).eps / torch.finfo(self.case.dtype).eps)

    def out(self, v: Tensor) -> Tensor:
        v = v.double().abs()
        return self.narrow(self.attn @ v, self.attn * self.uncertainty @ v)

    def importance(self, importance_from: str) -> Tensor:
        terms = self.attn * self.uncertainty
        if importance_from == "class":
            return terms[:, :, 0].mean(1)[:, self.case.prefix :]
        return (terms * self.alive).sum(2).div(self.alive.sum(2).clamp_min(TINY)).mean(1)[:, self.case.prefix :]

    def gradients(self, v: Tensor, gradient: Tensor, mask_gradient: str) -> tuple[Tensor, ...]:
        v, gradient = v.double().abs(), gradient.double().abs()
        change = gradient @ v.transpose(-1, -2)
        change = change + (self.attn * change).sum(-1, keepdim=True)

        def of_features(weights: Tensor, to_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            to_logits = to_logits * abs(self.case.logit_scale)
            return to_logits @ self.k, to_logits.transpose(-1, -2) @ self.q, weights.transpose(-1, -2) @ gradient

        exact = of_features(self.attn, self.seen * change)
        uncertain = of_features(self.attn * self.uncertainty, self.seen * change * self.uncertainty)
        shown = self.shown * self.weaker if mask_gradient == "difference" else self.shown
        to_mask = (shown * change * self.uncertainty).sum((1, 2))
        return (*(self.narrow(*pair) for pair in zip(exact, uncertain, strict=True)), to_mask)
