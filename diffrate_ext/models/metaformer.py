"""timm's MetaFormer with attention stages: CAFormer.

Only merging, in each attention stage apart (DiffRate's way with hierarchical models): importance is the
attention received, sizes add up, and where a grid is needed again every place gets the token that absorbed it.
"""

from __future__ import annotations

from typing import Any

from timm.models.metaformer import Attention, MetaFormer, MetaFormerBlock, MetaFormerStage, MlpHead
from torch import Tensor, nn

from .. import ops
from ..costs import BlockCost, ModelCost, StageCost
from ..errors import InputTypeError, InputValueError
from ..schedule import Schedule
from .adapter import Adapter, Stage, TokenRules, convolution_weights, linear_weights
from .classes import CompressedModule, has_forward_of, original_class, refuse_symbolic_trace, unwrapped
from .compressed import NO_STEP, Observer, Plan, Step, packed_attention, run_blocks


class CompressedMixer(CompressedModule, Attention):
    """MetaFormer's Attention, whose map the step never builds."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        return self.proj_drop(self.proj(packed_attention(self, x, step)))


class CompressedMetaFormerBlock(CompressedModule, MetaFormerBlock):
    """A MetaFormerBlock, with tokens reduced between attention and MLP."""

    @property
    def first_norm(self) -> nn.Module:
        return self.norm1

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:  # type: ignore[override]
        if step is None:
            raise InputTypeError(NO_STEP)
        branch = self.layer_scale1(self.drop_path1(self.token_mixer(step.norm(x, self.norm1), step)))
        x, normalized = step.reduce_and_norm(self.res_scale1(x), branch, self.norm2)
        return step.add(self.res_scale2(x), self.layer_scale2(self.drop_path2(self.mlp(normalized))))


class CompressedMetaFormerStage(CompressedModule, MetaFormerStage):
    """An attention stage whose blocks merge tokens; its output is a full grid again."""

    _diffrate_plan: Plan

    def forward(self, x: Tensor, observe: Observer | None = None) -> Tensor:
        refuse_symbolic_trace(x)
        x = self.downsample(x)
        rows, columns = x.shape[-2:]
        slots: list[Tensor] = []

        def remember(tokens: Tensor, slot: Tensor) -> None:
            slots.append(slot)
            if observe is not None:
                observe(tokens, slot)

        tokens = x.flatten(2).transpose(1, 2)
        steps = self._diffrate_plan.steps(tokens.shape[1], self.training)
        tokens, _ = run_blocks(
            list(self.blocks), tokens, steps, checkpointing=self.grad_checkpointing, observe=remember
        )
        tokens = ops.restore_tokens(tokens, slots[-1])
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class MetaFormerAdapter(Adapter):
    """The attention stages of a MetaFormer."""

    family = "MetaFormer"
    prunes = False
    model: MetaFormer

    @classmethod
    def knows(cls, model: nn.Module) -> bool:
        return isinstance(model, MetaFormer)

    def _check(self) -> None:
        stages = self._attention_stages
        if not stages:
            raise InputValueError("the MetaFormer has no attention stage to compress (CAFormer models have two)")
        for stage in stages:
            if not has_forward_of(stage, MetaFormerStage):
                raise InputValueError(f"the stage {original_class(stage).__name__} is not supported")
            for block in map(unwrapped, stage.blocks):
                if not has_forward_of(block, MetaFormerBlock) or not has_forward_of(block.token_mixer, Attention):
                    raise InputValueError(
                        f"the block {type(block).__name__} with {type(block.token_mixer).__name__} is not supported"
                    )

    def check_schedule(self, schedule: Schedule) -> None:
        fewest = min(schedule.after_merging)
        if fewest < 2:
            raise InputValueError(f"a MetaFormer block keeps 2 tokens or more, the schedule has {fewest}")
        if schedule.after_pruning is not None:
            raise InputValueError(
                "a MetaFormer is only merged: every place of the grid is needed again; use after_pruning=None"
            )

    @property
    def rules(self) -> TokenRules:
        return TokenRules(prefix=0, importance_from="received", size_rule="sum", spares_most_important=True)

    @property
    def stages(self) -> tuple[Stage, ...]:
        found: list[Stage] = []
        model: Any = self.model
        for stage, (rows, columns) in zip(model.stages, self._grids, strict=True):
            if not stage.use_nchw:
                blocks = tuple(unwrapped(block) for block in stage.blocks)
                first = not found  # the paper compresses the first attention stage, but for its first and last block
                compressible = tuple(first and 0 < index < len(blocks) - 1 for index in range(len(blocks)))
                found.append(Stage(stage, blocks, (rows, columns), rows * columns, compressible, fewest=2))
        return tuple(found)

    @property
    def cost(self) -> ModelCost:
        model: Any = self.model
        costs: list[StageCost] = []
        grids = self._grids
        fixed = grids[0][0] * grids[0][1] * model.stem.conv.weight.numel()
        for stage, (rows, columns) in zip(model.stages, grids, strict=True):
            tokens = rows * columns
            fixed += tokens * convolution_weights(stage.downsample)
            if stage.use_nchw:
                fixed += tokens * convolution_weights(stage.blocks)
                continue
            blocks = tuple(
                BlockCost(
                    attention=linear_weights(block.token_mixer),
                    pairs=2 * block.token_mixer.attention_dim,
                    mlp=linear_weights(block.mlp),
                )
                for block in map(unwrapped, stage.blocks)
            )
            costs.append(StageCost(tokens, fixed, blocks))
            fixed = 0
        head = model.num_features * model.num_classes
        if isinstance(model.head.fc, MlpHead):
            head *= 8  # the paper's convention
        return ModelCost(tuple(costs), fixed + head)

    @property
    def replacements(self) -> list[tuple[nn.Module, type[CompressedModule]]]:
        replaced: list[tuple[nn.Module, type[CompressedModule]]] = []
        for stage in self._attention_stages:
            replaced.append((stage, CompressedMetaFormerStage))
            for block in map(unwrapped, stage.blocks):
                replaced += [(block, CompressedMetaFormerBlock), (block.token_mixer, CompressedMixer)]
        return replaced

    def observe(self, images: Tensor, observe: Observer) -> None:
        x = self.model.stem(images)
        for stage in self.model.stages:
            x = stage(x, observe) if isinstance(stage, CompressedMetaFormerStage) else stage(x)

    @property
    def _attention_stages(self) -> list[Any]:
        return [stage for stage in self.model.stages if not stage.use_nchw]

    @property
    def _grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of each stage, for the image size of the model's configuration, 224 x 224 without one."""
        model: Any = self.model
        config = getattr(model, "pretrained_cfg", None) or {}
        rows, columns = config.get("input_size", (3, 224, 224))[1:]
        rows, columns = _length_after(model.stem.conv, rows), _length_after(model.stem.conv, columns)
        grids = []
        for stage in model.stages:
            if not isinstance(stage.downsample, nn.Identity):
                rows, columns = (_length_after(stage.downsample.conv, length) for length in (rows, columns))
            grids.append((rows, columns))
        return grids


def _length_after(conv: nn.Conv2d, length: int) -> int:
    """The length of one side after a (square) convolution."""
    return (length + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
