"""transformers' models, as compression sees them."""

from __future__ import annotations

import os
import sys
from typing import Any

from torch import Tensor, nn

from ...costs import BlockCost, ModelCost, StageCost
from ...errors import InputValueError
from ...schedule import Schedule
from ..adapter import Adapter, Stage, TokenRules, linear_weights
from ..classes import CompressedModule, original_class
from ..compressed import Observer
from ..patch_embedding import is_tiled
from .forms import LAYERS, MODELS, ModelForm, Pool
from .heads import CompressedAttentionPool, CompressedAttentionPooled, CompressedClassifier
from .layers import CompressedAttention, CompressedEncoder, CompressedLayer, MaskMaker

_MODULE = "transformers.models."
_POOLS_PATCHES = ("class and patches", "patches", "attention")


class HuggingFaceAdapter(Adapter):
    """Class-token models by class attention, models without one (SigLIP) by attention received."""

    family = ", ".join(MODELS)
    drop_paths = ("drop_path",)

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        original = original_class(model)
        return original.__module__.startswith(_MODULE) and original.__name__ in MODELS

    def _check(self) -> None:
        self.family = self._name  # type: ignore[misc]  # in messages about one model
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
            form, name = LAYERS.get(original_class(layer).__name__), type(layer).__name__
            if form is None:
                raise InputValueError(
                    f"layer {index} is a {name}, which is not supported: expected {', '.join(LAYERS)}"
                )
            missing = [part for part in form.parts if not hasattr(layer, part)]
            attention = getattr(layer, form.attention, None)
            if missing or not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj", "head_dim")):
                raise InputValueError(
                    f"layer {index}, a {name}, has other parts than in transformers 5{_installed()}: "
                    f"{', '.join(missing) or form.attention + '.q_proj, k_proj, v_proj'}"
                )

    def check_schedule(self, schedule: Schedule) -> None:
        fewest = min(schedule.after_merging)
        if self._pool in _POOLS_PATCHES and fewest <= self.rules.prefix:
            raise InputValueError(
                f"the schedule leaves {fewest} tokens, all of them prefix, but a {self._name} pools over patches"
            )

    @property
    def rules(self) -> TokenRules:
        if not self._form.has_class_token:
            return TokenRules(0, "received")
        return TokenRules(1 + getattr(self._config, "num_register_tokens", 0), "class")

    @property
    def stages(self) -> tuple[Stage, ...]:
        layers, prefix = tuple(self._layers), self.rules.prefix
        grid = self.grid_of(_pair(self._config.image_size))
        # what the last layer does reaches a class token no more, but it does reach a pool over patches
        end = len(layers) - 1 if self._pool in _POOLS_PATCHES else len(layers)
        compressible = tuple(0 < index < end for index in range(len(layers)))
        return (Stage(self._host, layers, grid, grid[0] * grid[1] + prefix, compressible, prefix + 1),)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        (height, width), (rows, columns) = image_size, _pair(self._config.patch_size)
        return height // rows, width // columns

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
        base, per_token = self._base, 0
        head = linear_weights(self.head) + linear_weights(getattr(base, "pooler", None))
        if (pool := getattr(base, "head", None)) is not None:  # one query attends to the tokens
            attention = pool.attention
            per_token = 2 * attention.embed_dim**2 + 2 * attention.embed_dim
            head += 2 * attention.embed_dim**2 + linear_weights(pool.mlp)
        return ModelCost((StageCost(stage.tokens, embedding, blocks),), head, per_token)

    @property
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        replaced: list[tuple[nn.Module, type[CompressedModule]]] = [(self._host, CompressedEncoder)]
        if self._form.makes_mask:
            replaced.append((self._base, MaskMaker))
        for layer in self._layers:
            replaced += [(layer, CompressedLayer), (_attention_of(layer), CompressedAttention)]
        if self._pool == "attention":
            replaced += [(self.model, CompressedAttentionPooled), (self.model.head, CompressedAttentionPool)]
        elif self._pool in _POOLS_PATCHES:
            replaced.append((self.model, CompressedClassifier))
        return replaced

    @property
    def patch_convolutions(self) -> list[nn.Module]:
        return [self._convolution] if is_tiled(self._convolution) else []

    def observe(self, images: Tensor, observe: Observer) -> None:
        self.model(pixel_values=images, diffrate_observe=observe)

    @property
    def head(self) -> nn.Module | None:
        return getattr(self.model, self._form.head) if self._form.head else None

    @property
    def undecayed(self) -> set[str]:
        patches = self._form.patches + "."
        names = (name for name, _ in self.model.named_parameters() if not name.startswith(patches))
        return {name for name in names if "embeddings" in name.split(".") or name.endswith(".probe")}

    @property
    def name(self) -> str | None:
        """As the model was loaded, where it was; a folder by its whole path."""
        name = getattr(self.model.config, "name_or_path", "")
        return (os.path.realpath(name) if os.path.isdir(name) else name) or None

    @property
    def _name(self) -> str:
        return original_class(self.model).__name__

    @property
    def _form(self) -> ModelForm:
        return MODELS[self._name]

    @property
    def _pool(self) -> Pool:
        """SigLIP comes without its pool, too."""
        return "none" if self._form.pool == "attention" and not hasattr(self.model, "head") else self._form.pool

    @property
    def _base(self) -> Any:
        return self.model.get_submodule(self._form.base)

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
        return self._base.config


def _attention_of(layer: Any) -> Any:
    return getattr(layer, LAYERS[original_class(layer).__name__].attention)


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def _installed() -> str:
    version = getattr(sys.modules.get("transformers"), "__version__", None)
    return f" ({version} is installed)" if version else ""
