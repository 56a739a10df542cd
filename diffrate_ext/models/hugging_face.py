"""Vision transformers of Hugging Face's transformers: ViT, DINOv2 (with registers), DINOv3, CLIP.

Their own forward passes run as they are, hooks, ``output_hidden_states`` and gradient checkpointing included. What
changes are the layers, which reduce their tokens between attention and MLP (DiffRate, section 3), and attention. Layers
learn what to do from a :class:`_Pass`, which the module that holds them hands to each as a keyword argument.

Nothing here imports transformers, which takes seconds: who has such a model has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..costs import BlockCost, ModelCost, StageCost
from ..errors import InputTypeError, InputValueError
from ..schedule import Schedule
from .adapter import Adapter, Stage, TokenRules, linear_weights
from .classes import CompressedModule, original_class
from .compressed import NO_STEP, Observer, Plan, Step, TokenState, attended
from .patch_embedding import is_tiled
from .rotary import RotaryPositions

_MODULE = "transformers.models."


@dataclass(frozen=True)
class _LayerForm:
    """What a layer calls its parts; all layers have a ``mlp``. An empty name: it has no such part."""

    norm1: str = "norm1"
    attention: str = "attention"
    scale1: str = ""
    norm2: str = "norm2"
    scale2: str = ""
    drop: str = ""

    @property
    def parts(self) -> list[str]:
        names = (self.norm1, self.attention, self.scale1, self.norm2, self.scale2, self.drop, "mlp")
        return [name for name in names if name]


_SCALED = _LayerForm(scale1="layer_scale1", scale2="layer_scale2", drop="drop_path")
_LAYERS: Mapping[str, _LayerForm] = {
    "ViTLayer": _LayerForm(norm1="layernorm_before", norm2="layernorm_after", drop="dropout"),
    "Dinov2Layer": _SCALED,
    "Dinov2WithRegistersLayer": _SCALED,
    "DINOv3ViTLayer": _SCALED,
    "CLIPEncoderLayer": _LayerForm(norm1="layer_norm1", attention="self_attn", norm2="layer_norm2"),
}


@dataclass(frozen=True)
class _ModelForm:
    """Where a model has its parts, as paths from it."""

    layers: str
    patches: str
    """The convolution that makes patches of pixels."""
    head: str = ""
    """A linear layer on the class token."""
    makes_mask: bool = False
    """Whether, under torch.export, the model makes an attention mask for the layers that masks nothing."""

    @property
    def host(self) -> str:
        """The module that runs the layers."""
        return self.layers.rpartition(".")[0]

    def inside(self, name: str, head: str = "") -> _ModelForm:
        """The same for a model that has this one under a name."""
        return _ModelForm(f"{name}.{self.layers}", f"{name}.{self.patches}", head)


_VIT = _ModelForm("layers", "embeddings.patch_embeddings.projection")
_DINO = _ModelForm("encoder.layer", "embeddings.patch_embeddings.projection", makes_mask=True)
_CLIP = _ModelForm("encoder.layers", "embeddings.patch_embedding")
_MODELS: Mapping[str, _ModelForm] = {
    "ViTModel": _VIT,
    "ViTForImageClassification": _VIT.inside("vit", "classifier"),
    "Dinov2Model": _DINO,
    "Dinov2WithRegistersModel": _DINO,
    "DINOv3ViTModel": _ModelForm("model.layer", "embeddings.patch_embeddings"),
    "CLIPVisionModel": _CLIP,
    "CLIPVisionModelWithProjection": _CLIP.inside("vision_model", "visual_projection"),
}


class _Pass:
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


class CompressedEncoder(CompressedModule, nn.Module):
    """The module that runs the layers: it hands them the pass."""

    _diffrate_plan: Plan
    config: Any

    def forward(
        self,
        *arguments: Any,
        attention_mask: Tensor | None = None,
        diffrate_observe: Observer | None = None,
        diffrate_masks_nothing: bool = False,
        **options: Any,
    ) -> Any:
        if not diffrate_masks_nothing:
            _refuse_mask(attention_mask)
        if options.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise InputValueError(
                "output_attentions=True: a compressed model never builds the attention maps; restore() it first"
            )
        layers: Any = getattr(self, "layers", None) or self.layer
        _keep_recording(self)
        options["diffrate_pass"] = _Pass(self._diffrate_plan, list(layers), self.training, diffrate_observe)
        return super().forward(*arguments, **options)


class MaskMaker(CompressedModule, nn.Module):
    """A model that makes a mask for its encoder: it takes none, so that the one it makes can be left out."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        _refuse_mask(attention_mask)
        _keep_recording(self)
        return super().forward(pixel_values, bool_masked_pos, diffrate_masks_nothing=True, **options)


class CompressedLayer(CompressedModule, nn.Module):
    """A layer, with tokens reduced between attention and MLP."""

    mlp: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        diffrate_pass: _Pass | None = None,
        **_: Any,
    ) -> Tensor:
        if diffrate_pass is None:
            raise InputTypeError(NO_STEP)
        form, index = _LAYERS[original_class(self).__name__], diffrate_pass.layers.index(self)
        step = diffrate_pass.step(index, hidden_states, position_embeddings)
        branch, _ = getattr(self, form.attention)(getattr(self, form.norm1)(hidden_states), step=step)
        branch = self._of(form.drop, self._of(form.scale1, branch))
        x, normalized = step.reduce_and_norm(hidden_states, branch, getattr(self, form.norm2))
        x = step.add(x, self._of(form.drop, self._of(form.scale2, self.mlp(normalized))))
        diffrate_pass.leave(index, step, x)
        return x

    def _of(self, part: str, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, part)(x) if part else x
        return result


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
        return _projection(self)(out), None


class HuggingFaceAdapter(Adapter):
    """A model with a class token, which alone its head and its pooler read."""

    family = ", ".join(_MODELS)
    returns_logits = False
    model: Any

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        original = original_class(model)
        return original.__module__.startswith(_MODULE) and original.__name__ in _MODELS

    def _check(self) -> None:
        for path in (self._form.layers, self._form.patches):
            try:
                self.model.get_submodule(path)
            except AttributeError:
                raise InputValueError(
                    f"{self._name} has no {path}, as it has in transformers 5{_installed()}"
                ) from None
        if not self._layers:
            raise InputValueError("the model has no layers to compress")
        for index, layer in enumerate(self._layers):
            form, name = _LAYERS.get(original_class(layer).__name__), type(layer).__name__
            if form is None:
                raise InputValueError(
                    f"layer {index} is a {name}, which is not supported: expected {', '.join(_LAYERS)}"
                )
            missing = [part for part in form.parts if not hasattr(layer, part)]
            attention = getattr(layer, form.attention, None)
            if missing or not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj", "head_dim")):
                raise InputValueError(
                    f"layer {index}, a {name}, has other parts than in transformers 5{_installed()}: "
                    f"{', '.join(missing) or form.attention + '.q_proj, k_proj, v_proj'}"
                )

    def check_schedule(self, schedule: Schedule) -> None:
        pass  # whatever is left, the class token is there

    @property
    def rules(self) -> TokenRules:
        return TokenRules(1 + getattr(self._config, "num_register_tokens", 0), "class")

    @property
    def stages(self) -> tuple[Stage, ...]:
        layers, prefix = tuple(self._layers), self.rules.prefix
        (height, width), (rows, columns) = (_pair(getattr(self._config, name)) for name in ("image_size", "patch_size"))
        grid = height // rows, width // columns
        compressible = tuple(index > 0 for index in range(len(layers)))
        return (Stage(self._host, layers, grid, grid[0] * grid[1] + prefix, compressible, prefix + 1),)

    @property
    def cost(self) -> ModelCost:
        (stage,) = self.stages
        blocks = tuple(
            BlockCost(
                attention=linear_weights(_attention_of(layer)),
                pairs=2 * _attention_of(layer).q_proj.out_features,
                mlp=linear_weights(layer.mlp),
            )
            for layer in stage.blocks
        )
        embedding = stage.tokens * self._convolution.weight.numel()
        head = linear_weights(getattr(self.model, self._form.head)) if self._form.head else 0
        head += linear_weights(getattr(self.model, "pooler", None))
        return ModelCost((StageCost(stage.tokens, embedding, blocks),), head)

    @property
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        replaced: list[tuple[nn.Module, type[CompressedModule]]] = [(self._host, CompressedEncoder)]
        if self._form.makes_mask:
            replaced.append((self.model, MaskMaker))
        for layer in self._layers:
            replaced += [(layer, CompressedLayer), (_attention_of(layer), CompressedAttention)]
        return replaced

    @property
    def patch_convolutions(self) -> list[nn.Module]:
        return [self._convolution] if is_tiled(self._convolution) else []

    def observe(self, images: Tensor, observe: Observer) -> None:
        self.model(pixel_values=images, diffrate_observe=observe)

    @property
    def name(self) -> str | None:
        """As the model was loaded, where it was."""
        return getattr(self.model.config, "name_or_path", "") or None

    @property
    def _name(self) -> str:
        return original_class(self.model).__name__

    @property
    def _form(self) -> _ModelForm:
        return _MODELS[self._name]

    @property
    def _host(self) -> Any:
        return self.model.get_submodule(self._form.host)

    @property
    def _layers(self) -> list[Any]:
        return list(self.model.get_submodule(self._form.layers))

    @property
    def _convolution(self) -> Any:
        return self.model.get_submodule(self._form.patches)

    @property
    def _config(self) -> Any:
        return self.model.config


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise InputValueError("a compressed model takes no attention_mask: restore() it first")


def _keep_recording(model: Any) -> None:
    """transformers knows by the name of a model's class which hidden states it may record: this is one more."""
    recording: Any = sys.modules.get("transformers.utils.output_capturing")
    can_record = getattr(model, "_can_record_outputs", None)
    if recording is not None and can_record and not recording._CAN_RECORD_REGISTRY.get(model):
        recording._CAN_RECORD_REGISTRY[model] = can_record


def _attention_of(layer: Any) -> Any:
    return getattr(layer, _LAYERS[original_class(layer).__name__].attention)


def _projection(attention: Any) -> Any:
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def _installed() -> str:
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    return f" ({version} is installed)" if version else ""
