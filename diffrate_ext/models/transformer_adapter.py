"""What compression has to know about a model that is one row of blocks, in timm's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from timm.layers import AttentionPoolLatent, PatchEmbed
from torch import Tensor, nn

from ..costs import BlockCost, ModelCost, StageCost
from ..errors import InputValueError
from ..schedule import Schedule
from .adapter import Adapter, Stage, TokenRules, linear_weights
from .classes import CompressedModule, has_forward_of, original_class, unwrapped
from .compressed import Observer
from .patch_embedding import is_tiled
from .transformer import POOLS, POOLS_CLASS_TOKEN, CompressedTransformer

Mixins = Mapping[type[nn.Module], type[CompressedModule]]
"""For each of timm's classes that is supported, what changes its forward."""


class TransformerAdapter(Adapter):
    """Class-token models by class attention, models without one by attention received."""

    base: ClassVar[type[nn.Module]]
    """timm's class of the model."""
    heads: ClassVar[tuple[Callable[..., Any], ...]]
    """The ``forward_head`` that are known."""
    compressed: ClassVar[type[CompressedTransformer]]
    block_mixins: ClassVar[Mixins]
    attention_mixins: ClassVar[Mixins]
    model: Any

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.base)

    def _check(self) -> None:
        model, cls, base = self.model, original_class(self.model), self.base
        overridden = [name for name in ("forward", "forward_features", "pool") if _of(cls, name) is not _of(base, name)]
        if cls.forward_head not in self.heads:
            overridden.append("forward_head")
        if overridden:
            raise InputValueError(
                f"{cls.__name__} overrides {base.__name__}.{overridden[0]}, which compression would bypass"
            )
        if not isinstance(model.blocks, (nn.Sequential, nn.ModuleList)) or len(model.blocks) == 0:
            raise InputValueError("the model has no blocks to compress")
        for index, block in enumerate(self._blocks):
            if not has_forward_of(block, *self.block_mixins):
                raise InputValueError(
                    f"blocks[{index}] is a {type(block).__name__}, which is not supported: tokens are compressed "
                    f"between attention and MLP, as timm's {_names(self.block_mixins)} have them"
                )
            if not has_forward_of(block.attn, *self.attention_mixins):
                raise InputValueError(
                    f"blocks[{index}].attn is a {type(block.attn).__name__}, which is not supported: expected timm's "
                    f"{_names(self.attention_mixins)}"
                )
        if model.global_pool == "map" and (
            not has_forward_of(model.attn_pool, AttentionPoolLatent) or model.attn_pool.pos_embed is not None
        ):
            raise InputValueError(
                "attention pooling with a position embedding is not supported: tokens lose their places"
            )
        if model.global_pool not in POOLS:
            raise InputValueError(f"global_pool={model.global_pool!r} is not supported")

    def check_schedule(self, schedule: Schedule) -> None:
        fewest = min(schedule.after_merging)
        if self.model.global_pool not in POOLS_CLASS_TOKEN and fewest <= self.model.num_prefix_tokens:
            raise InputValueError(
                f"the schedule leaves {fewest} tokens, all of them prefix, but the model pools over patches "
                f"(global_pool={self.model.global_pool!r})"
            )

    @property
    def rules(self) -> TokenRules:
        # not has_class_token, which not every class has
        class_token = getattr(self.model, "cls_token", None) is not None
        return TokenRules(self.model.num_prefix_tokens, "class" if class_token else "received")

    @property
    def stages(self) -> tuple[Stage, ...]:
        blocks, prefix = self._blocks, self.model.num_prefix_tokens
        rows, columns = _grid(self.model.patch_embed)
        # what the last block does reaches a class token no more, but it does reach a pool over patches
        end = len(blocks) if self.model.global_pool in POOLS_CLASS_TOKEN else len(blocks) - 1
        compressible = tuple(0 < index < end for index in range(len(blocks)))
        return (Stage(self.model, blocks, (rows, columns), rows * columns + prefix, compressible, prefix + 1),)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = self.model.patch_embed.dynamic_feat_size(image_size)
        return rows, columns

    @property
    def cost(self) -> ModelCost:
        model = self.model
        if not has_forward_of(model.patch_embed, PatchEmbed):
            raise InputValueError(
                f"the FLOPs of patch_embed, a {type(model.patch_embed).__name__}, are not known: expected PatchEmbed"
            )
        (stage,) = self.stages
        blocks = tuple(
            BlockCost(
                attention=linear_weights(block.attn),
                pairs=2 * block.attn.num_heads * block.attn.head_dim,
                mlp=linear_weights(block.mlp),
            )
            for block in stage.blocks
        )
        embedding = stage.tokens * model.patch_embed.proj.weight.numel()
        # a distilled model has a second head
        head = sum(linear_weights(getattr(model, name, None)) for name in ("head", "head_dist"))
        per_token = 0
        if model.global_pool == "map":
            pool = model.attn_pool
            per_token = linear_weights(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += pool.latent_len * (linear_weights(pool) - linear_weights(pool.kv))
        return ModelCost((StageCost(stage.tokens, embedding, blocks),), head, per_token)

    @property
    def _blocks(self) -> tuple[Any, ...]:
        return tuple(unwrapped(block) for block in self.model.blocks)

    @property
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        replaced: list[tuple[nn.Module, type[CompressedModule]]] = [(self.model, self.compressed)]
        for block in self._blocks:
            replaced.append((block, _mixin_for(block, self.block_mixins)))
            replaced.append((block.attn, _mixin_for(block.attn, self.attention_mixins)))
        return replaced

    @property
    def patch_convolutions(self) -> list[nn.Module]:
        projection: Any = getattr(self.model.patch_embed, "proj", None)
        return [projection] if is_tiled(projection) else []

    def observe(self, images: Tensor, observe: Observer) -> None:
        self.model.forward_tokens(images, observe)


def _grid(patch_embed: Any) -> tuple[int, int]:
    """(rows, columns) of patches for the model's own image size."""
    padded = getattr(patch_embed, "dynamic_img_pad", False)  # grid_size counts no patch that is partly padding
    rows, columns = patch_embed.dynamic_feat_size(patch_embed.img_size) if padded else patch_embed.grid_size
    return rows, columns


def _of(cls: type, name: str) -> object:
    return getattr(cls, name)


def _names(classes: Mixins) -> str:
    return " and ".join(cls.__name__ for cls in classes)


def _mixin_for(module: nn.Module, mixins: Mixins) -> type[CompressedModule]:
    return next(mixin for original, mixin in mixins.items() if has_forward_of(module, original))
