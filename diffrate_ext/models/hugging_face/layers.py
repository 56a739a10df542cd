"""transformers' layers, compressed: what a model hands to its layers, and what they do with it."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import InputTypeError, InputValueError
from ..classes import CompressedModule, original_class
from ..compressed import NO_STEP, Observer, Plan, Step, TokenState, attended
from ..rotary import RotaryPositions
from .forms import LAYERS


class Pass:
    """One forward pass of a model: what its layers do with their tokens, and what came of it so far.

    States are kept by layer, so that a layer that is computed again, for its gradients, finds what it found before.
    """

    def __init__(self, plan: Plan, layers: list[Any], training: bool, observe: Observer | None) -> None:
        self.plan, self.layers, self.training, self.observe = plan, layers, training, observe
        self.states = {0: TokenState()}
        self.rotary: RotaryPositions | None = None
        self.positions: dict[int, Tensor] = {}
        self.slot: Tensor | None = None

    def step(self, index: int, x: Tensor, cosine_and_sine: tuple[Tensor, Tensor] | None) -> Step:
        """A layer's step, for the tokens (B, N, C) that come to it."""
        if index == 0:
            self.steps = self.plan.steps(x.shape[1], self.training)
            if cosine_and_sine is not None:
                embedding = torch.cat(cosine_and_sine[::-1], -1)[None, None]
                self.rotary = RotaryPositions(embedding, x.shape[1] - embedding.shape[2])
            if self.observe is not None:
                self.slot = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        if index >= len(self.steps):
            raise InputValueError(
                f"the model has {len(self.layers)} layers, and was compressed with {len(self.steps)}: do it again"
            )
        step = self.steps[index](self.states[index])
        if self.rotary is not None and index not in self.positions:
            self.positions[index] = self.rotary.of_block(index)
        step.positions = self.positions.get(index)
        return step

    def leave(self, index: int, step: Step, x: Tensor) -> None:
        """A layer is done, and these are its tokens (B, K, C)."""
        if index + 1 in self.states:  # computed again
            return
        self.states[index + 1] = step.after
        if self.rotary is not None and step.source is not None:
            self.rotary.follow(step.source)
        if self.observe is not None and self.slot is not None:
            self.slot = self.slot if step.slot is None else ops.compose_slots(self.slot, step.slot)
            self.observe(x, self.slot)


class CompressedHost(CompressedModule, nn.Module):
    """A module with a forward of its own among those of transformers, which go by their class's name."""

    named: ClassVar[str] = "{}"
    config: Any

    def _keep_recording(self) -> None:
        """transformers knows by its class which hidden states of a model it may record: this is one more."""
        recording: Any = sys.modules.get("transformers.utils.output_capturing")
        can_record = getattr(self, "_can_record_outputs", None)
        if recording is not None and can_record and not recording._CAN_RECORD_REGISTRY.get(self):
            recording._CAN_RECORD_REGISTRY[self] = can_record


class CompressedEncoder(CompressedHost):
    """The module that runs the layers: it hands them the pass."""

    _diffrate_plan: Plan

    def forward(
        self,
        *arguments: Any,
        attention_mask: Tensor | None = None,
        diffrate_observe: Observer | None = None,
        diffrate_weights: list[Tensor | None] | None = None,
        diffrate_masks_nothing: bool = False,
        **options: Any,
    ) -> Any:
        """As of the uncompressed module. ``diffrate_weights`` gets what the tokens count for in the end."""
        if not diffrate_masks_nothing:
            _refuse_mask(attention_mask)
        if options.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise InputValueError(
                "output_attentions=True: a compressed model never builds the attention maps; restore() it first"
            )
        layers: Any = getattr(self, "layers", None) or self.layer
        self._keep_recording()
        this = Pass(self._diffrate_plan, list(layers), self.training, diffrate_observe)
        output = super().forward(*arguments, diffrate_pass=this, **options)
        if diffrate_weights is not None:
            diffrate_weights.append(this.states[len(this.layers)].weights)
        return output


class MaskMaker(CompressedHost):
    """A model that makes a mask for its encoder: it takes none, so that the one it makes can be left out."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        _refuse_mask(attention_mask)
        self._keep_recording()
        return super().forward(pixel_values, bool_masked_pos, diffrate_masks_nothing=True, **options)


class CompressedLayer(CompressedModule, nn.Module):
    """A layer, with tokens reduced between attention and MLP."""

    mlp: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        diffrate_pass: Pass | None = None,
        **_: Any,
    ) -> Tensor:
        if diffrate_pass is None:
            raise InputTypeError(NO_STEP)
        form, index = LAYERS[original_class(self).__name__], diffrate_pass.layers.index(self)
        step = diffrate_pass.step(index, hidden_states, position_embeddings)
        branch, _ = getattr(self, form.attention)(getattr(self, form.norm1)(hidden_states), step=step)
        branch = self._dropped(form.drop, self._scaled(form.scale1, branch))
        x, normalized = step.reduce_and_norm(hidden_states, branch, getattr(self, form.norm2))
        x = step.add(x, self._dropped(form.drop, self._scaled(form.scale2, self.mlp(normalized))))
        diffrate_pass.leave(index, step, x)
        return x

    def _scaled(self, part: str, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, part)(x) if part else x
        return result

    def _dropped(self, part: str, x: Tensor) -> Tensor:
        if part:
            x = getattr(self, part)(x)
        drop_path: Any = getattr(self, "drop_path", None)  # some layers have one, and fine-tuning gives one to any
        return x if drop_path is None else drop_path(x)


class CompressedAttention(CompressedModule, nn.Module):
    """A layer's attention, whose map the step never builds, whichever implementation the model was loaded with."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    head_dim: int

    def forward(self, hidden_states: Tensor, step: Step | None = None) -> tuple[Tensor, None]:
        q, k, v = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = getattr(self, "attention_dropout", getattr(self, "dropout", 0.0)) if self.training else 0.0
        out = attended(q, k, v, step, scale=self.head_dim**-0.5, dropout=dropout, halves=True)
        projection: Any = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return projection(out), None


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise InputValueError("a compressed model takes no attention_mask: restore() it first")
