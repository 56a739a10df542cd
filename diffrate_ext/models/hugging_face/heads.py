"""What pools over patches in transformers' models, where each token counts for its size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputValueError
from ..classes import CompressedModule, original_class
from ..pooling import masked_attention_to, weighted_mean
from .forms import MODELS
from .layers import CompressedHost


class CompressedClassifier(CompressedHost):
    """A classifier that averages over patches."""

    classifier: Any
    loss_function: Any

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **options: Any) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        form = MODELS[original_class(self).__name__]
        as_tuple = not _wants_names(self, options)
        weights: list[Tensor | None] = []
        output = getattr(self, form.base)(pixel_values, diffrate_weights=weights, return_dict=True, **options)
        tokens, (weight,) = output.last_hidden_state, weights
        first = int(form.has_class_token) + getattr(self.config, "num_register_tokens", 0)
        if tokens.shape[1] <= first:
            raise InputValueError(
                f"a {original_class(self).__name__} averages over patches, but the schedule leaves none: "
                f"{tokens.shape[1]} tokens, all of them prefix"
            )
        patches = tokens[:, first:]
        pooled = patches.mean(1) if weight is None else weighted_mean(patches, weight[:, first:])
        if form.pool == "class and patches":
            pooled = torch.cat([tokens[:, 0], pooled], dim=1)
        logits = self.classifier(pooled)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return result.to_tuple() if as_tuple else result


class CompressedAttentionPooled(CompressedHost):
    """A model with attention pooling (SigLIP): it pools when it knows what its tokens count for."""

    head: Any

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self._keep_recording()
        as_tuple = not _wants_names(self, options)
        weights: list[Tensor | None] = options.setdefault("diffrate_weights", [])
        output = super().forward(*arguments, return_dict=True, **options)
        output["pooler_output"] = self.head(output.last_hidden_state, weights)
        output = type(output)(**output)  # in the order of its class: the answer was added at the end
        return output.to_tuple() if as_tuple else output


class CompressedAttentionPool(CompressedModule, nn.Module):
    """SigLIP's pooling: attention of a learned query to the tokens."""

    attention: Any
    layernorm: Any
    mlp: Any
    probe: Tensor

    def forward(self, hidden_state: Tensor, weights: list[Tensor | None] | None = None) -> Tensor | None:
        if weights is None:
            return None  # asked too early, by the model's own forward
        (weight,) = weights
        if weight is None:
            pooled: Tensor = super().forward(hidden_state)
            return pooled
        x = self._attended(hidden_state, weight)
        return (x + self.mlp(self.layernorm(x)))[:, 0]

    def _attended(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """The query after attention (B, 1, C), for tokens (B, K, C) that count for these (B, K)."""
        attention, heads = self.attention, self.attention.num_heads
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        inputs = (self.probe.expand(tokens.shape[0], -1, -1), tokens, tokens)
        q, k, v = (
            F.linear(x, *part).unflatten(2, (heads, -1)).transpose(1, 2) for x, part in zip(inputs, parts, strict=True)
        )
        if weight.requires_grad:
            out = masked_attention_to(q, k, v, weight, q.shape[-1] ** -0.5)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=weight.log()[:, None, None].to(q.dtype))
        attended: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
        return attended


def _wants_names(model: Any, options: dict[str, Any]) -> bool:
    """Whether the output is wanted by name, and not as a tuple. Takes the option out."""
    wanted = options.pop("return_dict", None)
    return bool(getattr(model.config, "return_dict", True) if wanted is None else wanted)
