"""Compression rates that the loss's gradient reaches (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .compression import install_plan
from .models import adapter_for
from .models.base import Plan, original_class
from .models.masked import BlockRates, SearchPlan
from .reference import rate_candidates
from .schedule import Schedule

START_WIDTH = 0.05
"""Of the patches: the standard deviation of a distribution to search from."""


class RateSearch(nn.Module):
    """A model with differentiable compression rates.

    The model changes in place, as by :func:`diffrate_ext.compress`: in training mode its forward is the search step, in
    which tokens are masked instead of dropped and the gradient of the loss reaches the rates; in evaluation mode it
    compresses at the current rates. ``diffrate_ext.restore(model)`` undoes it. For DistributedDataParallel wrap the
    RateSearch itself: only what is trained is reduced.

    Each block that the paper compresses has a proxy for pruning and one for merging: logits over how many patches it
    may keep, ``n_patches - granularity * k`` while positive. The first block has none, nor has the last block of a
    model that pools over patches.

    Args:
        model: one of timm's VisionTransformer or MetaFormer (CAFormer) models, uncompressed or compressed.
        granularity: the step between candidates, in patches.
        train_weights: train the model's weights too. By default they are frozen, and no gradient of theirs is computed.

    Attributes:
        model: the model.
        prune_logits: (compressible blocks, candidates); None in a family that is only merged.
        merge_logits: (compressible blocks, candidates).

    Raises:
        TypeError: the model's family is not supported.
        ValueError: a part of the model is not supported, or no block of it can be compressed.
    """

    prune_logits: nn.Parameter | None

    def __init__(self, model: nn.Module, granularity: int = 1, train_weights: bool = False) -> None:
        super().__init__()
        if isinstance(granularity, bool) or not isinstance(granularity, int):
            raise TypeError(f"granularity must be an int, got {type(granularity).__name__}")
        if granularity < 1:
            raise ValueError(f"granularity must be at least 1, got {granularity}")
        self._adapter = adapter_for(model)
        stages = self._adapter.stages(model)
        with_rates = [index for index, stage in enumerate(stages) if any(stage.compressible)]
        if not with_rates:
            raise ValueError("the model has no block to compress: the first one never is")
        (self._stage_index,) = with_rates  # in a hierarchical model, the paper compresses one stage
        self._stages = stages
        self._cost = self._adapter.cost(model)
        stage = stages[self._stage_index]
        self.granularity = granularity
        self.prefix = self._adapter.prefix(model)
        self.n_patches = stage.tokens - self.prefix
        shape = (sum(stage.compressible), len(rate_candidates(self.n_patches, granularity)))
        device = next(model.parameters()).device
        self.merge_logits = nn.Parameter(torch.zeros(shape, device=device))
        self.prune_logits = nn.Parameter(torch.zeros(shape, device=device)) if self._adapter.prunes else None

        parts = zip(self._adapter.compressed_parts(model), stages, strict=True)
        compressor = self._adapter.compressor(model)
        for index, ((module, mixin), part) in enumerate(parts):
            plan = SearchPlan(compressor, index, part.tokens, original_class(module), self)
            install_plan(module, mixin, plan)
        self.model = model
        self._frozen = [] if train_weights else [p for p in model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits: the search step in training mode, the compressed model otherwise."""
        return self.model(images)

    def gflops(self) -> Tensor:
        """Multiply-accumulates of one image at the current rates in units of 1e9, 0-d, differentiable.

        A block passes on ``min(N, kept_p, kept_m)`` tokens; the gradient goes to both kept numbers alike, and none to
        N, not even in a block without rates (section 3.4 of the paper).
        """
        kept, _ = self._kept()
        kept = kept.double()  # sums of squares of token numbers need more digits than float32 has
        numbers: list[list[Any]] = []
        for index, stage in enumerate(self._stages):
            rows = self._rows(index, kept)
            left: Any = stage.tokens
            numbers.append([])
            for row in rows:
                left = torch.as_tensor(left, dtype=kept.dtype, device=kept.device).detach()
                if row is not None:
                    left = torch.minimum(left, row.detach().amin()) + (row - row.detach()).sum()
                numbers[-1].append(left)
        total: Any = self._cost.total(numbers)
        return (total / 1e9).to(self.merge_logits.dtype)

    def schedule(self) -> Schedule:
        """The schedule that the rates stand for now. Kept numbers count the prefix tokens."""
        kept = self._kept()[0].detach().round().long().cpu()
        prune: list[int] = []
        merge: list[int] = []
        for index, stage in enumerate(self._stages):
            left = stage.tokens
            for row in self._rows(index, kept):
                pruned, merged = (left, left) if row is None else (int(row[0]), int(row[-1]))
                after_pruning = min(left, pruned)
                left = min(after_pruning, merged)
                prune.append(after_pruning)
                merge.append(left)
        return Schedule(
            prune if self._adapter.prunes else None,
            merge,
            prefix=self.prefix,
            grid=self._stages[0].grid,
            model=self._adapter.name(self.model),
        )

    def reachable_gflops(self) -> tuple[float, float]:
        """The least and the most that any rates can lead to."""
        stage, candidates = self._stages[self._stage_index], rate_candidates(self.n_patches, self.granularity)
        return self._gflops_at(max(stage.fewest, candidates[-1] + self.prefix)), self._gflops_at(stage.tokens)

    def check_reachable(self, gflops: float) -> None:
        """Raise ValueError when no rates lead to so many GFLOPs, with the range that they lead to."""
        least, most = self.reachable_gflops()
        if not least <= gflops <= most * (1 + 1e-9):
            raise ValueError(
                f"{gflops:g} GFLOPs cannot be reached: the model takes {most:.4g} uncompressed, and {least:.4g} "
                "with all the tokens removed that may be removed"
            )

    @torch.no_grad()
    def set_schedule(self, schedule: Schedule) -> None:
        """Make the rates stand for a schedule, or nearly so: a place to search from.

        Each distribution becomes a bell around the number that is wanted, of a width from which a search can move on:
        narrow, so that its gradient speaks of the tokens nearby, but not so narrow that it has none.

        Raises:
            ValueError: the schedule does not fit the model.
        """
        steps = self._adapter.steps(self.model, schedule)[self._stage_index]
        compressible = self._stages[self._stage_index].compressible
        wanted = [numbers for numbers, here in zip(steps, compressible, strict=True) if here]
        candidates = torch.tensor(rate_candidates(self.n_patches, self.granularity), dtype=torch.float64)
        width = max(self.n_patches * START_WIDTH, self.granularity)
        for column, logits in zip((0, 1) if self._adapter.prunes else (1,), self._proxies(), strict=True):
            # half a token less: a kept number is a ceiling
            means = torch.tensor([numbers[column] - self.prefix - 0.5 for numbers in wanted], dtype=torch.float64)
            # at the ends of the range a bell is cut off: its centre lies further out than the mean that is wanted
            low, high = torch.full_like(means, -self.n_patches), torch.full_like(means, 2.0 * self.n_patches)
            for _ in range(60):
                centre = (low + high) / 2
                bell = -((candidates - centre[:, None]) ** 2) / (2 * width**2)
                above = (bell.softmax(-1) * candidates).sum(-1) > means
                low, high = torch.where(above, low, centre), torch.where(above, centre, high)
            logits.copy_(bell - bell.amax(-1, keepdim=True))

    @torch.no_grad()
    def project(self, gflops: float) -> None:
        """Shift the rates so that :meth:`schedule` takes so many GFLOPs, as nearly as whole tokens allow.

        Every distribution over candidates is tilted by the same factor per patch, ``p_k ~ exp(logit_k + tilt * c_k)``:
        where the search was sure, little moves.

        Raises:
            ValueError: no rates lead there.
        """
        self.check_reachable(gflops)
        proxies = self._proxies()
        found = [logits.clone() for logits in proxies]
        candidates = torch.tensor(rate_candidates(self.n_patches, self.granularity), device=proxies[0].device)
        offset = (candidates / self.n_patches).to(proxies[0].dtype)  # rising tilt: more tokens

        def error(tilt: float) -> float:
            for logits, start in zip(proxies, found, strict=True):
                logits.copy_(start + tilt * offset)
            return self.schedule().gflops(self.model) - gflops

        below, above = -1.0, 1.0
        while error(below) > 0 and below > -1e8:
            below *= 2
        while error(above) < 0 and above < 1e8:
            above *= 2
        for _ in range(60):
            middle = (below + above) / 2
            if error(middle) > 0:
                above = middle
            else:
                below = middle
        error(min((below, above), key=lambda tilt: abs(error(tilt))))

    @contextmanager
    def uncompressed(self) -> Iterator[nn.Module]:
        """The model as it was before the search, in evaluation mode, within a ``with`` block."""
        modules = [module for module, _ in self._adapter.compressed_parts(self.model)]
        classes, training = [type(module) for module in modules], [m.training for m in self.model.modules()]
        self.model.eval()
        for module in modules:
            module.__class__ = original_class(module)
        try:
            yield self.model
        finally:
            for module, cls in zip(modules, classes, strict=True):
                module.__class__ = cls
            for module, mode in zip(self.model.modules(), training, strict=True):
                module.training = mode

    # --- what SearchPlan asks

    def block_rates(self, stage: int) -> Sequence[BlockRates | None]:
        """The rates of each block of a stage, None for blocks that are never compressed."""
        if stage != self._stage_index:
            return [None] * len(self._stages[stage].blocks)
        kept, keep_prob = self._kept()
        rates: list[BlockRates | None] = []
        for row, prob in zip(self._rows(stage, kept), self._rows(stage, keep_prob), strict=True):
            if row is None or prob is None:
                rates.append(None)
            elif self._adapter.prunes:
                rates.append(BlockRates(prob[0], prob[1], row[0], row[1]))
            else:  # pruning to all tokens prunes nothing
                everything = row.new_full((), self._stages[stage].tokens)
                rates.append(BlockRates(torch.ones_like(prob[0]), prob[0], everything, row[0]))
        return rates

    def plan(self, stage: int) -> Plan:
        """The compression that the rates stand for now."""
        steps = self._adapter.steps(self.model, self.schedule())[stage]
        module, _ = self._adapter.compressed_parts(self.model)[stage]
        return Plan(self._adapter.compressor(self.model), self._stages[stage].tokens, steps, original_class(module))

    def release(self) -> None:
        """Weights that the search froze train again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _gflops_at(self, kept: int) -> float:
        """GFLOPs if every block that may compress keeps so many tokens."""
        numbers = []
        for index, stage in enumerate(self._stages):
            left, row = stage.tokens, list[int]()
            for here in stage.compressible:
                left = min(left, kept) if here and index == self._stage_index else left
                row.append(left)
            numbers.append(row)
        return self._cost.total(numbers) / 1e9

    def _proxies(self) -> tuple[Tensor, ...]:
        """The logits of pruning, if there are any, and of merging."""
        return (self.merge_logits,) if self.prune_logits is None else (self.prune_logits, self.merge_logits)

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Kept numbers (blocks, 1 or 2) and keep probabilities (blocks, 1 or 2, N): pruning, then merging."""
        logits = torch.stack(self._proxies(), dim=1)
        kept, keep_prob = ops.compression_rate(logits.flatten(0, 1), self.n_patches, self.granularity, self.prefix)
        fewest = self._stages[self._stage_index].fewest  # one patch to merge into; CAFormer needs two
        kept = kept + (fewest - kept).clamp_min(0).detach()  # a bound that stops no gradient
        return kept.view(logits.shape[:2]), keep_prob.view(*logits.shape[:2], -1)

    def _rows(self, stage: int, values: Tensor) -> list[Tensor | None]:
        """One row of values for each block of the stage that has rates, None for the others."""
        rows = iter(values.unbind())
        compressible = self._stages[stage].compressible
        return [next(rows) if here and stage == self._stage_index else None for here in compressible]
