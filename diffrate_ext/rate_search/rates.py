"""Compression rates that the loss's gradient reaches (the differentiable discrete proxy, DiffRate, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..compression.costing import check_method, costing_of
from ..compression.flops import flops
from ..compression.patching import install_plans, without_plans
from ..cost_table import CostTable
from ..errors import DivergedError, InputTypeError, InputValueError
from ..methods import METHODS, Method, MethodPlan, method_of
from ..methods.masking import BlockRates, MaskGradient, everything
from ..models import Stage, adapter_for
from ..models.compressed import NewStep, Plan
from ..numeric import rate_candidates
from ..schedule import Schedule
from .target import nearest_tilt

START_WIDTH = 0.05
"""Of the patches: the standard deviation of a distribution to search from."""
NEVER = -1e4
"""The logit of a number of patches that neither an update nor a tilt is to bring back."""
FLOPS_SCALE = 106.0 / 5
"""The square of DeiT-S's 4.6 GFLOPs: on that model the relative FLOPs loss equals the paper's absolute one."""


class RateSearch(nn.Module):
    """A model with differentiable compression rates.

    The model changes in place, as by :func:`diffrate_ext.compress`: in training mode its forward is the search step, in
    which tokens are masked instead of dropped and the gradient of the loss reaches the rates; in evaluation mode it
    compresses at the current rates. ``diffrate_ext.restore(model)`` undoes it. For DistributedDataParallel wrap the
    RateSearch itself: only what is trained is reduced.

    Each block that the paper compresses has a proxy for pruning and one for merging: logits over how many patches it
    may keep, ``n_patches - granularity * k`` while positive. The first block has none, nor has the last block of a
    model that pools over patches. Methods that only prune or only merge have one proxy, ToMe in the first block too.

    Args:
        model: a supported model (docs/models.md), uncompressed or compressed.
        granularity: the step between candidates, in patches.
        train_weights: train the model's weights too. By default they are frozen, and no gradient of theirs is computed.
        mask_gradient: of a masked token, as for :func:`diffrate_ext.ops.masked_attention`: the paper's "derivative", or
            "difference", which no token that would outshine all others drowns in noise.
        method: what the rates are for, as for :func:`diffrate_ext.compress`: DiffRate with any options, or ToMe.
        costs: of :func:`diffrate_ext.profile_model`: targets are milliseconds of a batch instead of GFLOPs.

    Attributes:
        model: the model.
        prune_logits: (compressible blocks, candidates); None where nothing is pruned.
        merge_logits: (compressible blocks, candidates); None where nothing is merged.
        method: the method.
        costing: how targets are counted.
        n_patches, granularity, prefix: as above; the model's prefix tokens.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: a part of the model is not supported, or no block of it can be compressed; the method cannot
            be searched, or cannot run the model.
    """

    prune_logits: nn.Parameter | None
    merge_logits: nn.Parameter | None

    def __init__(
        self,
        model: nn.Module,
        granularity: int = 1,
        train_weights: bool = False,
        mask_gradient: MaskGradient = "difference",
        *,
        method: str | Method = "diffrate",
        costs: CostTable | None = None,
    ) -> None:
        super().__init__()
        if mask_gradient not in ("difference", "derivative"):
            raise InputValueError(f"mask_gradient must be 'difference' or 'derivative', got {mask_gradient!r}")
        self.mask_gradient = mask_gradient
        if isinstance(granularity, bool) or not isinstance(granularity, int):
            raise InputTypeError(f"granularity must be an int, got {type(granularity).__name__}")
        if granularity < 1:
            raise InputValueError(f"granularity must be at least 1, got {granularity}")
        self._adapter = adapter = adapter_for(model)
        stages = adapter.stages
        self.method = method = _searchable(method_of(method))
        self.costs, self.costing = costs, costing_of(model, costs)
        check_method(costs, method)
        method.check(adapter, [stage.all_tokens for stage in stages])
        with_rates = [index for index, stage in enumerate(stages) if any(method.compressible(stage))]
        if not with_rates:
            raise InputValueError("the model has no block to compress: the first one never is")
        (self._stage_index,) = with_rates  # in a hierarchical model, the paper compresses one stage
        stage = stages[self._stage_index]
        self._has_rates = method.compressible(stage)
        self.granularity = granularity
        self.prefix = adapter.rules.prefix
        self.n_patches = stage.tokens - self.prefix
        shape = (sum(self._has_rates), len(rate_candidates(self.n_patches, granularity)))
        device = next(model.parameters()).device
        merges, prunes = "merge" in method.proxies, "prune" in method.proxies and adapter.prunes
        self.merge_logits = nn.Parameter(torch.zeros(shape, device=device)) if merges else None
        self.prune_logits = nn.Parameter(torch.zeros(shape, device=device)) if prunes else None
        install_plans(adapter, [_SearchPlan(self, index) for index in range(len(stages))])
        self.model = model
        self._frozen = [] if train_weights else [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits: the search step in training mode, the compressed model otherwise."""
        return self.model(images)

    def gflops(self) -> Tensor:
        """Multiply-accumulates of one image at the current rates in units of 1e9, 0-d, differentiable.

        As :meth:`cost`, whatever the targets are counted in.
        """
        return (self._adapter.cost.total(self._left()) / 1e9).to(self._proxies()[0].dtype)

    def cost(self) -> Tensor:
        """What the rates cost now, counted as the targets are: GFLOPs of one image, or milliseconds of a batch by the
        cost table; 0-d, differentiable.

        A block passes on ``min(N, kept_p, kept_m)`` tokens; the gradient goes to both kept numbers alike, and none to
        N, not even in a block without rates (as in the authors' code).
        """
        return self.costing.of(self._left()).to(self._proxies()[0].dtype)

    def _left(self) -> list[list[Any]]:
        """Tokens left after each block of each stage, 0-d and with a gradient where there are rates."""
        kept = self._kept()[0].double()  # sums of squares of token numbers need more digits than float32 has
        numbers: list[list[Any]] = []
        for index, stage in enumerate(self._adapter.stages):
            left: Any = stage.tokens
            numbers.append([])
            for row in self._rows(index, stage, kept):
                if isinstance(left, Tensor):
                    left = left.detach()
                if row is not None:
                    left = row.detach().amin().clamp(max=left) + (row - row.detach()).sum()
                numbers[-1].append(left)
        return numbers

    def flops_loss(
        self, target_gflops: float, *, weight: float = 5.0, kind: Literal["relative", "absolute"] = "relative"
    ) -> Tensor:
        """The term of the loss that draws the rates to a target, 0-d.

        Args:
            target_gflops: multiply-accumulates of one image, in units of 1e9.
            weight: lambda in the paper.
            kind: "relative", ``106 * weight/5 * ((FLOPs - target) / uncompressed FLOPs)^2``, pulls alike on models of
                every size; "absolute" is the paper's ``weight * (GFLOPs - target)^2``. They are equal on DeiT-S.
        """
        return flops_loss(self.gflops(), target_gflops, flops(self.model) / 1e9, weight, kind)

    def schedule(self) -> Schedule:
        """The schedule that the rates stand for now.

        Raises:
            DivergedError: the logits hold NaN or infinity.
        """
        stages = self._adapter.stages
        numbers = [pair for row in self._numbers(self._kept()[0], stages) for pair in row]
        return Schedule(
            None if self.prune_logits is None else [pruned for pruned, _ in numbers],
            [merged for _, merged in numbers],
            prefix=self.prefix,
            grid=stages[0].grid,
            model=self._adapter.name,
            stages=[len(stage.blocks) for stage in stages] if len(stages) > 1 else None,
            method=str(self.method),
        )

    def reachable(self) -> tuple[float, float]:
        """The least and the most cost that any rates can lead to."""
        stages = self._adapter.stages
        stage, candidates = stages[self._stage_index], rate_candidates(self.n_patches, self.granularity)
        fewest = max(stage.fewest, candidates[-1] + self.prefix)

        def cost_at(kept: int) -> float:
            """If every block that has rates keeps so many tokens."""
            numbers = []
            for index, stage in enumerate(stages):
                left, row = stage.tokens, list[int]()
                for here in self._rates_of(index, stage):
                    removed = left - kept if here else 0
                    most = self.method.most_removed(left, self.prefix)
                    left -= max(0, removed if most is None else min(removed, most))
                    row.append(left)
                numbers.append(row)
            cost: float = self.costing.of(numbers)
            return cost

        return cost_at(fewest), cost_at(stage.tokens)

    @torch.no_grad()
    def set_schedule(self, schedule: Schedule) -> None:
        """Make the rates stand for a schedule, or nearly so: a place to search from.

        Each distribution becomes a bell around the number that is wanted, of a width from which a search can move on:
        narrow, so that its gradient speaks of the tokens nearby, but not so narrow that it has none.

        A schedule that merges and never prunes turns pruning off, for a search of merging alone. The FLOPs have the
        same gradient for both, though pruning saves nothing where the same tokens would be merged: pruning would come
        back for that alone.

        Raises:
            InputValueError: the schedule does not fit the model.
        """
        numbers, left, prunes, merges = [], self._adapter.stages[self._stage_index].tokens, False, False
        for pruned, merged in self._adapter.kept_numbers(schedule)[self._stage_index]:
            prunes, merges = prunes or pruned < left, merges or merged < pruned
            first, last = (merged, left - (pruned - merged)) if self.method.merges_first else (pruned, merged)
            numbers.append((first, last))
            left = merged
        wanted = [number for number, here in zip(numbers, self._has_rates, strict=True) if here]
        candidates = torch.tensor(rate_candidates(self.n_patches, self.granularity), dtype=torch.float64)
        width = max(self.n_patches * START_WIDTH, self.granularity)
        proxies = self._proxies()
        for column, logits in zip((0, 1) if len(proxies) == 2 else (1,), proxies, strict=True):
            # half a token less: a kept number is a ceiling
            means = torch.tensor([number[column] - self.prefix - 0.5 for number in wanted], dtype=torch.float64)
            # at the ends of the range a bell is cut off: its centre lies further out than the mean that is wanted
            low, high = torch.full_like(means, -self.n_patches), torch.full_like(means, 2.0 * self.n_patches)
            for _ in range(60):
                centre = (low + high) / 2
                bell = -((candidates - centre[:, None]) ** 2) / (2 * width**2)
                above = (bell.softmax(-1) * candidates).sum(-1) > means
                low, high = torch.where(above, low, centre), torch.where(above, centre, high)
            logits.copy_(bell - bell.amax(-1, keepdim=True))
        if merges and not prunes and len(proxies) == 2 and not self.method.merges_first:
            proxies[0].fill_(NEVER)[:, 0] = 0.0

    @torch.no_grad()
    def project(self, target: float | str, tolerance: float = 0.0) -> None:
        """Shift the rates so that :meth:`schedule` costs so much, as nearly as whole tokens allow.

        Every distribution over candidates is tilted by the same factor per patch, ``p_k ~ exp(logit_k + tilt * c_k)``:
        where the search was sure, little moves.

        Args:
            target: GFLOPs of one image (or, with a cost table, milliseconds of a batch), or a share of the uncompressed
                model's, such as ``"60%"``.
            tolerance: the share of the target that it may be off: the first tilt that is near enough is taken, none
                where the rates are near enough as they are.

        Raises:
            InputValueError: no rates lead there.
            DivergedError: the logits hold NaN or infinity.
        """
        target = self.costing.number(target)
        check_reachable(self, target)
        found = torch.stack(self._proxies(), dim=1).cpu()  # once: each tilt that is tried would stop the stream
        direction = self.tilt_direction().cpu()
        stages = self._adapter.stages

        def error(tilt: float) -> float:
            numbers = self._numbers(self._kept(found + tilt * direction)[0], stages)
            cost: float = self.costing.of([[merged for _, merged in row] for row in numbers])
            return cost - target

        tilt = nearest_tilt(error, tolerance * target)
        if tilt:
            for logits, tilted in zip(self._proxies(), (found + tilt * direction).unbind(1), strict=True):
                logits.copy_(tilted)

    def tilt_direction(self) -> Tensor:
        """What a tilt adds to the logits of each proxy (candidates), up to a factor: more for more patches."""
        logits = self._proxies()[0]
        candidates = torch.tensor(rate_candidates(self.n_patches, self.granularity), device=logits.device)
        return (candidates / self.n_patches).to(logits.dtype)

    def uncompressed(self) -> AbstractContextManager[nn.Module]:
        """The model as it was before the search, in evaluation mode, within a ``with`` block."""
        return without_plans(self.model)

    # --- inside

    def _proxies(self) -> tuple[Tensor, ...]:
        """The logits of pruning, if there are any, and of merging, if there are any."""
        return tuple(logits for logits in (self.prune_logits, self.merge_logits) if logits is not None)

    def _kept(self, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Kept numbers (blocks, 1 or 2) and keep probabilities (blocks, 1 or 2, N): pruning, then merging.

        Of the rates as they are, or of other logits (blocks, 1 or 2, candidates).
        """
        logits = torch.stack(self._proxies(), dim=1) if logits is None else logits
        kept, keep_prob = ops.compression_rate(logits.flatten(0, 1), self.n_patches, self.granularity, self.prefix)
        fewest = self._adapter.stages[self._stage_index].fewest  # one patch to merge into; CAFormer needs two
        kept = kept + (fewest - kept).clamp_min(0).detach()  # a bound that stops no gradient
        return self._possible(kept.view(logits.shape[:2])), keep_prob.view(*logits.shape[:2], -1)

    def _possible(self, kept: Tensor) -> Tensor:
        """Kept numbers (blocks, 1 or 2), raised to what the method can come down to from block to block."""
        tokens = self._adapter.stages[self._stage_index].tokens
        if self.method.most_removed(tokens, self.prefix) is None:
            return kept
        left, fewest = kept.new_full((), tokens), []
        for wanted in kept.detach().round().amin(1):
            fewest.append(left - self.method.most_removed(left, self.prefix))
            left = left.minimum(wanted.maximum(fewest[-1]))
        return kept + (torch.stack(fewest)[:, None] - kept).clamp_min(0).detach()

    def _numbers(self, kept: Tensor, stages: Sequence[Stage]) -> list[list[tuple[int, int]]]:
        """Tokens left after pruning and after merging in each block of each stage, for kept numbers (blocks, 1 or 2).

        Raises:
            DivergedError: they are NaN or infinity.
        """
        kept = kept.detach().cpu()
        _check_finite(kept)
        rows = iter(kept.round().long().tolist())
        numbers: list[list[tuple[int, int]]] = []
        for index, stage in enumerate(stages):
            left = stage.tokens
            numbers.append([])
            for here in self._rates_of(index, stage):
                row = next(rows) if here else [left]
                before, left = left, min(left, *row)
                # a schedule says what pruning alone would leave
                pruned = left + before - min(before, row[-1]) if self.method.merges_first else min(before, row[0])
                numbers[-1].append((pruned, left))
        return numbers

    def _rates_of(self, index: int, stage: Stage) -> tuple[bool, ...]:
        """Which blocks of a stage have rates. A model that was cut short since has fewer blocks than rates."""
        if index != self._stage_index:
            return (False,) * len(stage.blocks)
        return self._has_rates[: len(stage.blocks)]

    def _rows(self, index: int, stage: Stage, values: Tensor) -> list[Tensor | None]:
        """One row of values for each block of a stage that has rates, None for the others."""
        rows = iter(values.unbind())
        return [next(rows) if here else None for here in self._rates_of(index, stage)]

    def _drop_plan(self, index: int) -> MethodPlan:
        """The compression that the rates stand for now."""
        adapter, stage = self._adapter, self._adapter.stages[index]
        numbers = adapter.kept_numbers(self.schedule())[index]
        return MethodPlan(self.method, adapter.rules, stage.tokens, numbers, stage.fewest)

    def _mask_steps(self, index: int) -> list[NewStep]:
        """The search step at the current rates."""
        rules, stage = self._adapter.rules, self._adapter.stages[index]
        step = partial(self.method.search_step, rules, mask_gradient=self.mask_gradient)
        if index != self._stage_index:
            return [partial(step, None) for _ in stage.blocks]
        kept, keep_prob = self._kept()
        if kept.device.type == "cpu":  # elsewhere looking would stop the stream
            _check_finite(kept)
        steps: list[NewStep] = []
        for row, prob in zip(self._rows(index, stage, kept), self._rows(index, stage, keep_prob), strict=True):
            rates = None if row is None or prob is None else self._block_rates(row, prob)
            steps.append(partial(step, rates))
        return steps

    def _block_rates(self, kept: Tensor, prob: Tensor) -> BlockRates:
        """Of kept numbers (1 or 2) and keep probabilities (1 or 2, N)."""
        nothing_goes, all_stay = everything(prob[0])
        prune = (nothing_goes, all_stay) if self.prune_logits is None else (prob[0], kept[0])
        merge = (nothing_goes, all_stay) if self.merge_logits is None else (prob[-1], kept[-1])
        return BlockRates(prune[0], merge[0], prune[1], merge[1])

    def _release(self) -> None:
        """Weights that the search froze train again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


class _SearchPlan(Plan):
    """What a stage does during the search: masks in training mode, compression at the current rates otherwise."""

    masks_in_training = True

    def __init__(self, rates: RateSearch, index: int) -> None:
        self.rates, self.index = rates, index
        self.tokens = rates._adapter.stages[index].tokens  # when the search began

    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        rates, own = self.rates, self.tokens
        now = rates._adapter.stages[self.index].tokens
        if now != own:
            raise InputValueError(
                f"the model's image size changed since this search began, from {own} tokens to {now}: restore() it and "
                "make a new RateSearch"
            )
        if not training:
            return rates._drop_plan(self.index).steps(tokens, training)
        if tokens != own:
            raise InputValueError(
                f"the search needs images of the model's own size and no patch dropout: {own} tokens, got {tokens}"
            )
        return rates._mask_steps(self.index)

    def release(self) -> None:
        self.rates._release()


def flops_loss(
    gflops: Tensor, target: float, uncompressed: float, weight: float, kind: Literal["relative", "absolute"]
) -> Tensor:
    """As :meth:`RateSearch.flops_loss`, of GFLOPs that are known."""
    missing = gflops - target
    if kind == "absolute":
        return weight * missing.square()
    return FLOPS_SCALE * weight * (missing / uncompressed).square()


def check_reachable(rates: RateSearch, target: float) -> None:
    """Raise InputValueError when no rates lead to such a cost, with the range that they lead to."""
    least, most = rates.reachable()
    if not least <= target <= most * (1 + 1e-9):
        raise rates.costing.unreachable(target, least, "with all the tokens removed that may be removed")


def _searchable(method: Method) -> Method:
    if not method.proxies:
        known = [name for name, kind in METHODS.items() if kind().proxies]
        raise InputValueError(f"method {str(method)!r} has no rates to learn: the search knows {' and '.join(known)}")
    return method


def _check_finite(kept: Tensor) -> None:
    if not kept.isfinite().all():
        raise DivergedError("the search diverged: the logits of the rates hold NaN or infinity")
