"""Training DynamicViT's predictors (Rao et al., NeurIPS 2021, section 3.3).

Nothing is dropped while they learn: the tokens that they decide against are masked, so that the loss says what would
change if they were there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .answers import has_classes
from .compression.copies import uncompressed_copy
from .compression.patching import install_plans
from .compression.uniform import uniform_schedule
from .errors import DivergedError, InputTypeError, InputValueError
from .evaluation import split_batch
from .methods import DynamicViT, Predictors
from .methods.dynamicvit import pruning_blocks
from .methods.method import after_each_quarter
from .methods.predictors import Predictor
from .models import Stage, adapter_for
from .models.adapter import TokenRules
from .models.compressed import NewStep, Plan, Step, TokenState
from .numeric import wide_dtype
from .schedule import Schedule
from .seeding import seeded
from .training.batches import Loader, fitting_labels, step_batches
from .training.settings_checks import check_amounts, check_whole_numbers

WEIGHTS_LR = 0.01
"""The model's learning rate beside that of the predictors, which start from nothing."""

# The last part of the key of a step's own random choices, beside the loader's.
_IN_THE_STEP = 1


@dataclass(frozen=True)
class PredictorSettings:
    """How to train predictors. The weights of the loss are the paper's.

    Attributes:
        steps: batches to train on.
        lr: learning rate of the first step; it falls to 0 along a cosine.
        kl_weight: of the distance from what the uncompressed model says, beside the labels. Without labels it stands
            alone, with weight 1; for a model without classes, 1 - cosine of the features does.
        feature_weight: of the mean squared difference between the kept tokens and those of the uncompressed model.
        ratio_weight: of the squared difference between the share of the patches that is kept and its target.
        train_weights: train the model, too, with a hundredth of the learning rate.
        seed: of all random choices, the loader's included as far as they come from the generators of torch, numpy and
            ``random`` in this process.

    Raises:
        InputValueError: a number out of range.
    """

    steps: int = 300
    lr: float = 3e-3
    kl_weight: float = 0.5
    feature_weight: float = 0.5
    ratio_weight: float = 2.0
    train_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(self, steps=1, seed=0)
        check_amounts(self, "lr", "kl_weight", "feature_weight", "ratio_weight")


def train_predictors(
    model: nn.Module,
    loader: Loader,
    target: float | Schedule,
    settings: PredictorSettings | None = None,
    *,
    report: Callable[[int, float], None] | None = None,
) -> Predictors:
    """Train predictors with which ``compress(model, schedule, method=DynamicViT(predictors))`` drops tokens.

    They are for one model and the blocks in which the schedule removes tokens, and serve other schedules that remove
    tokens in no other block. The model is left as it is, but for weights that are trained with them.

    Args:
        model: a supported model whose tokens may be pruned, trained, with or without classes.
        loader: batches of images, or (images, labels), as for :func:`diffrate_ext.search`.
        target: GFLOPs of one image, which the usual schedule of DynamicViT meets: in the blocks after each quarter of
            the depth the same share of the patches stays. Or a schedule.
        settings: how to train; by default ``PredictorSettings()``.
        report: called after each step with its number, from 0, and its loss.

    Raises:
        InputTypeError: the model's family is not supported, or a batch is of another type.
        InputValueError: a part of the model is not supported, the target cannot be reached, the schedule removes no
            tokens, or there are no images.
        DivergedError: the loss is not finite.
    """
    settings = settings or PredictorSettings()
    student: Any = uncompressed_copy(model)  # shares the weights
    if not hasattr(student, "forward_features"):
        raise InputTypeError(
            "predictors learn on timm's models, from what their forward_features and forward_head return; a "
            f"{type(student).__name__} has none"
        )
    predictors, schedule = _start(student, target, settings.seed)
    own = next(student.parameters())
    predictors.to(own.device)
    adapter = adapter_for(student)
    (stage,), (kept,) = adapter.stages, adapter.kept_numbers(schedule)
    plan = MaskingPlan(predictors, adapter.rules, stage)
    install_plans(adapter, [plan])
    teacher = uncompressed_copy(model).eval()
    if settings.train_weights:
        teacher = copy.deepcopy(teacher)  # which stays as it was
    shares = torch.tensor([kept[block][1] - stage.prefix for block in predictors.blocks], device=own.device)
    lesson = Lesson(student, teacher, plan, shares / (stage.tokens - stage.prefix), settings)
    with _training(student, settings.train_weights) as weights:
        groups = [{"params": list(predictors.parameters()), "share": 1.0}, {"params": weights, "share": WEIGHTS_LR}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        for step, batch in enumerate(step_batches(loader, 0, settings.steps, seed=settings.seed, rank=0)):
            images, labels = split_batch(batch)
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
            optimizer.zero_grad()
            with seeded(settings.seed, step, _IN_THE_STEP, device=own.device):
                loss = lesson.loss(images.to(own.device, own.dtype, non_blocking=True), labels)
                loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(f"step {step}: the loss is not finite ({value:g})")
            optimizer.step()
            if report is not None:
                report(step, value)
    return predictors.requires_grad_(False)


def _start(model: nn.Module, target: float | Schedule, seed: int) -> tuple[Predictors, Schedule]:
    """Predictors with random weights in the blocks that are to remove tokens, and how many these keep."""
    adapter = adapter_for(model)
    (stage, *others) = adapter.stages
    if others or not adapter.prunes:
        raise InputValueError(f"a {adapter.family} is only merged, and DynamicViT prunes")
    if isinstance(target, Schedule):
        blocks = pruning_blocks(stage.tokens, adapter.kept_numbers(target)[0])
        if not blocks:
            raise InputValueError("the schedule removes no tokens: there is nothing to learn")
    elif isinstance(target, (int, float)):
        blocks = after_each_quarter(len(stage.blocks))
    else:
        raise InputTypeError(f"target must be GFLOPs or a Schedule, got {type(target).__name__}")
    with seeded(seed):
        predictors = Predictors.untrained(adapter, blocks)
    if isinstance(target, Schedule):
        return predictors, target
    return predictors, uniform_schedule(model, target, method=DynamicViT(predictors))


class MaskByDecision(Step):
    """One block's patches masked where a predictor decides against them; what is masked once stays so."""

    def __init__(
        self, rules: TokenRules, predictor: Predictor | None, decided: Callable[[Tensor], None], before: TokenState
    ) -> None:
        self.rules, self.predictor, self.decided, self.before = rules, predictor, decided, before

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        prefix, mask = self.rules.prefix, self.before.mask
        if mask is None:  # fused attention computes the same
            return ops.proportional_attention(q, k, v, None, scale=scale, prefix=prefix, importance_from=None)[0]
        wanted = self.rules.importance_from  # which nobody asks for, but the operator gives one
        return ops.masked_attention(
            q, k, v, mask, scale=scale, prefix=prefix, importance_from=wanted, mask_gradient="difference"
        )[0]

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + branch
        self.after, self.slot = self.before, None
        if self.predictor is not None:
            prefix, mask = self.rules.prefix, self.before.mask
            if mask is None:
                mask = torch.ones(x.shape[:2], dtype=wide_dtype(x), device=x.device)
            before = mask[:, prefix:]
            log_probabilities = self.predictor(x[:, prefix:], before)
            kept = before * decisions(log_probabilities)
            best = (log_probabilities[..., 0] + before.log()).argmax(1, keepdim=True)
            kept = kept.scatter(1, best, 1.0)  # nothing else may be left to pool over
            self.decided(kept)
            mask = torch.cat([mask[:, :prefix], kept], dim=1)
            self.after = TokenState(torch.ones_like(mask), mask)  # heads that pool weigh sizes with the mask
        return x


def decisions(log_probabilities: Tensor) -> Tensor:
    """1 to keep and 0 to drop, (B, n), drawn with these probabilities (B, n, 2), and a gradient as if soft."""
    return F.gumbel_softmax(log_probabilities, hard=True)[..., 0]


class MaskingPlan(Plan):
    """Masks tokens in every mode, and remembers what was decided in the last forward pass."""

    masks_in_training = True

    def __init__(self, predictors: Predictors, rules: TokenRules, stage: Stage) -> None:
        self.predictors, self.rules, self.stage = predictors, rules, stage
        self.kept: list[Tensor] = []

    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        if tokens != self.stage.tokens:
            raise InputValueError(
                f"predictors train on images of the model's own size: {self.stage.tokens} tokens, got {tokens}"
            )
        self.kept.clear()
        blocks = range(len(self.stage.blocks))
        return [partial(MaskByDecision, self.rules, self.predictors.get(block), self.kept.append) for block in blocks]


class Lesson:
    """What predictors are to learn from a batch."""

    def __init__(
        self, student: Any, teacher: Any, plan: MaskingPlan, shares: Tensor, settings: PredictorSettings
    ) -> None:
        self.student, self.teacher, self.plan, self.shares, self.settings = student, teacher, plan, shares, settings

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        settings = self.settings
        with torch.no_grad():
            wanted_tokens = self.teacher.forward_features(images)
            wanted = self.teacher.forward_head(wanted_tokens).float()
        tokens, mask = self.student.forward_tokens(images)
        found = self.student.forward_head(tokens, size=mask).float()
        kept = torch.stack([decided.mean(1) for decided in self.plan.kept], dim=1)
        ratio = (kept - self.shares).square().mean()
        there = mask.detach()  # a token is not to go because its features are far off
        distance = (tokens.to(there.dtype) - wanted_tokens).square().mean(-1)
        features = (there * distance).sum() / there.sum()
        return self._answers(found, wanted, labels) + settings.feature_weight * features + settings.ratio_weight * ratio

    def _answers(self, found: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        if not has_classes(self.student):
            return 1 - F.cosine_similarity(found, wanted).mean()
        divergence = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        if labels is None:
            return divergence
        return F.cross_entropy(found, fitting_labels(labels, wanted)) + self.settings.kl_weight * divergence


@contextmanager
def _training(model: nn.Module, train_weights: bool) -> Iterator[list[nn.Parameter]]:
    """Within a ``with`` block the model learns, and its weights are given; or it is frozen, without dropout."""
    if train_weights:
        model.train()
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
        return
    model.eval()
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield []
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
