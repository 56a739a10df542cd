"""timm's MetaFormer with attention stages: CAFormer.

Only merging, in each attention stage apart (method of the paper's section 4 on hierarchical models): importance is the
attention received, sizes add up, and where a grid is needed again every place gets the token that absorbed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.metaformer import Attention, MetaFormer, MetaFormerBlock, MetaFormerStage, MlpHead
from torch import Tensor, nn

from .. import ops
from ..flops import BlockCost, ModelCost, StageCost
from ..schedule import Schedule
from .base import (
    Adapter,
    AttentionFunction,
    BlockCompressor,
    CompressedModule,
    Observer,
    Stage,
    attention_of_packed_qkv,
    has_forward_of,
    original_class,
    weight_count,
)
from .masked import BlockRates, TokenState


class CompressedMetaFormerStage(CompressedModule, MetaFormerStage):
    """An attention stage whose blocks merge tokens; its output is a full grid again."""

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        x = self.downsample(x)
        rows, columns = x.shape[-2:]
        slots: list[Tensor] = []

        def remember(tokens: Tensor, slot: Tensor) -> None:
            slots.append(slot)
            if observe is not None:
                observe(tokens, slot)

        tokens = x.flatten(2).transpose(1, 2)
        plan, checkpointing = self._diffrate_plan, self.grad_checkpointing
        tokens, _ = plan.run(self.blocks, tokens, checkpointing=checkpointing, observe=remember)
        tokens = ops.restore_tokens(tokens, slots[-1])
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


@dataclass(frozen=True)
class MetaFormerCompressor(BlockCompressor):
    """Merging by attention received. The most important token of each block takes no other token in.

    The authors' code treats it like a class token; the published results stand on that.
    """

    def reduce(
        self, shortcut: Tensor, branch: Tensor, importance: Tensor, k_p: int, k_m: int, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, size, order = ops.sort_tokens(shortcut + branch, importance, size, prefix=0)
        x, size, target = ops.prune_merge(x, _falling(size), k_p, k_m, size, prefix=1, sizes="sum")
        return x, size, torch.empty_like(target).scatter_(1, order, target)

    def reduce_masked(
        self, x: Tensor, importance: Tensor, state: TokenState, rates: BlockRates
    ) -> tuple[Tensor, TokenState, Tensor]:
        x, size, order = ops.sort_tokens(x, importance, state.size, prefix=0)
        mask = torch.ones_like(size) if state.mask is None else state.mask.gather(1, order)
        x, mask, size, _, dst = ops.masked_prune_merge(
            x,
            mask,
            _falling(size),
            size,
            rates.prune_prob,
            rates.merge_prob,
            rates.kept_p,
            rates.kept_m,
            prefix=1,
            sizes="sum",
        )
        return x, TokenState(mask, size), torch.empty_like(dst).scatter_(1, order, dst)


class MetaFormerAdapter(Adapter):
    """The attention stages of a MetaFormer."""

    family = "MetaFormer"
    prunes = False

    def knows(self, model: nn.Module) -> bool:
        return isinstance(model, MetaFormer)

    def check(self, model: nn.Module) -> None:
        stages = self._attention_stages(model)
        if not stages:
            raise ValueError("the MetaFormer has no attention stage to compress (CAFormer models have two)")
        for stage in stages:
            if not has_forward_of(stage, MetaFormerStage):
                raise ValueError(f"the stage {original_class(stage).__name__} is not supported")
            for block in stage.blocks:
                if not has_forward_of(block, MetaFormerBlock) or not has_forward_of(block.token_mixer, Attention):
                    raise ValueError(
                        f"the block {type(block).__name__} with {type(block.token_mixer).__name__} is not supported"
                    )

    def check_schedule(self, model: nn.Module, schedule: Schedule) -> None:
        if min(schedule.merge) < 2:
            raise ValueError(f"a MetaFormer block keeps 2 tokens or more, the schedule has {min(schedule.merge)}")
        if schedule.prune is not None:
            raise ValueError("a MetaFormer is only merged: every place of the grid is needed again; use prune=None")

    def prefix(self, model: nn.Module) -> int:
        return 0

    def stages(self, model: nn.Module) -> tuple[Stage, ...]:
        found: list[Stage] = []
        for stage, (rows, columns) in zip(_stages(model), self._grids(model), strict=True):
            if not stage.use_nchw:
                blocks = tuple(stage.blocks)
                first = not found  # the paper compresses the first attention stage, but for its first and last block
                compressible = tuple(first and 0 < index < len(blocks) - 1 for index in range(len(blocks)))
                found.append(Stage(blocks, (rows, columns), rows * columns, compressible, 2))
        return tuple(found)

    def cost(self, model: nn.Module) -> ModelCost:
        metaformer = cast(Any, model)
        costs: list[StageCost] = []
        grids = self._grids(model)
        fixed = grids[0][0] * grids[0][1] * metaformer.stem.conv.weight.numel()
        for stage, (rows, columns) in zip(_stages(model), grids, strict=True):
            tokens = rows * columns
            fixed += tokens * weight_count(stage.downsample, nn.Conv2d)
            if stage.use_nchw:
                fixed += tokens * weight_count(stage.blocks, nn.Conv2d)
                continue
            blocks = tuple(
                BlockCost(
                    attention=weight_count(block.token_mixer, nn.Linear),
                    pairs=2 * block.token_mixer.attention_dim,
                    mlp=weight_count(block.mlp, nn.Linear),
                )
                for block in stage.blocks
            )
            costs.append(StageCost(tokens, fixed, blocks))
            fixed = 0
        head = metaformer.num_features * metaformer.num_classes
        if isinstance(metaformer.head.fc, MlpHead):
            head *= 8  # the paper's convention
        return ModelCost(tuple(costs), fixed + head)

    def attention(self, block: Any, x: Tensor, attend: AttentionFunction) -> tuple[Tensor, Tensor, Tensor | None]:
        mixer = block.token_mixer
        branch, importance = attention_of_packed_qkv(mixer, block.norm1(x), attend)
        branch = mixer.proj_drop(mixer.proj(branch))
        return block.res_scale1(x), block.layer_scale1(block.drop_path1(branch)), importance

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.res_scale2(x) + block.layer_scale2(block.drop_path2(block.mlp(block.norm2(x))))

    def compressor(self, model: nn.Module) -> BlockCompressor:
        return MetaFormerCompressor(self, 0, "received")

    def compressed_parts(self, model: nn.Module) -> list[tuple[nn.Module, type[CompressedModule]]]:
        return [(stage, CompressedMetaFormerStage) for stage in self._attention_stages(model)]

    def run(self, model: nn.Module, images: Tensor, observe: Observer) -> None:
        x = cast(Any, model).stem(images)
        for stage in _stages(model):
            x = stage(x, observe) if isinstance(stage, CompressedMetaFormerStage) else stage(x)

    def _attention_stages(self, model: nn.Module) -> list[Any]:
        return [stage for stage in _stages(model) if not stage.use_nchw]

    def _grids(self, model: Any) -> list[tuple[int, int]]:
        """(rows, columns) of each stage, for the image size of the model's configuration, 224 x 224 without one."""
        config = getattr(model, "pretrained_cfg", None) or {}
        rows, columns = config.get("input_size", (3, 224, 224))[1:]
        rows, columns = _through(model.stem.conv, rows), _through(model.stem.conv, columns)
        grids = []
        for stage in _stages(model):
            if not isinstance(stage.downsample, nn.Identity):
                rows, columns = _through(stage.downsample.conv, rows), _through(stage.downsample.conv, columns)
            grids.append((rows, columns))
        return grids


def _falling(size: Tensor) -> Tensor:
    """An importance (B, N-1) for tokens that are in order already and shall stay so."""
    images, tokens = size.shape
    return torch.arange(tokens - 1, 0, -1, dtype=size.dtype, device=size.device).expand(images, -1)


def _stages(model: nn.Module) -> list[Any]:
    return list(cast(Any, model).stages)


def _through(conv: nn.Conv2d, length: int) -> int:
    """The length of one side after a (square) convolution."""
    return (length + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
