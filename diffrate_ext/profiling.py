"""How long a model's blocks take by their tokens, measured on this machine."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .compression.copies import compressed_copy, uncompressed_copy
from .compression.flops import flops
from .compression.patching import install_plans
from .compression.uniform import uniform_schedule
from .cost_table import CostTable, StageTimes
from .costs import BlockCost
from .errors import InputValueError
from .machine import processor, settle_memory
from .methods import Method, method_of
from .methods.dropping import DropTokens
from .models import Stage, adapter_for
from .models.adapter import TokenRules
from .models.compressed import NewStep, Plan, Step, TokenState
from .schedule import KeptNumbers, Schedule
from .timing import random_images

POINTS = 24
"""Numbers of tokens that are tried, about."""
MIDDLING = ("65%", "80%", "90%")
"""FLOPs of a whole compressed model that is timed, too: the first that the method's rule reaches."""
REMOVED = 0.15
"""Of the patches: what a block removes where that is timed."""


def profile_model(
    model: nn.Module,
    *,
    batch_size: int = 16,
    method: str | Method = "diffrate",
    rounds: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> CostTable:
    """Time a model's blocks over numbers of tokens: what a schedule costs on this machine, before it is run.

    Runs on the device and in the dtype of the model's parameters, in evaluation mode, without gradients. The model
    itself runs, with all its blocks, each of which keeps the tokens that it gets; every second one also removes some,
    which is timed and thrown away. Numbers of tokens take turns, ``rounds`` times, and medians count. What a whole
    compressed model takes beyond the sum of its pieces is put down to removing tokens.

    Args:
        model: a supported model (docs/models.md), compressed or not. It is left as it is.
        batch_size: images in a batch of random pixels.
        method: what removes tokens, as for :func:`compress`.
        rounds: how often each number of tokens is timed.
        on_progress: called after each pass with the passes done and all.

    Raises:
        InputTypeError: the model's family is not supported.
        InputValueError: a part of the model is not supported; a batch size or a number of rounds below one; the method
            cannot run the model.
    """
    if rounds < 1:
        raise InputValueError(f"rounds must be at least 1, got {rounds}")
    method = method_of(method)
    plain, images = uncompressed_copy(model).eval(), random_images(model, batch_size)
    watched = uncompressed_copy(model).eval()
    adapter = adapter_for(watched)
    method.check(adapter, [stage.all_tokens for stage in adapter.stages])
    clock = _Clock(images.device)
    plans = [_Profile(method, adapter.rules, stage, adapter.prunes, clock) for stage in adapter.stages]
    install_plans(adapter, plans)
    schedule = _middling(plain, method)
    whole_models = [plain] if schedule is None else [plain, compressed_copy(model, schedule, method=method).eval()]
    order, rest = list(range(max(len(plan.tokens) for plan in plans))), list[float]()
    wholes: list[list[float]] = []
    shuffled = random.Random(0)

    @torch.inference_mode()
    def run(form: nn.Module) -> float:
        begun = clock.mark()
        form(images)
        return clock.between([(begun, clock.mark())])[0]

    settle_memory()
    run(plain)
    for turn in range(-1, rounds):  # the first is to warm up
        shuffled.shuffle(order)
        for done, index in enumerate(order):
            for plan in plans:
                plan.begin(index, turn)
            seconds = run(watched)
            blocks = [plan.finish(keep=turn >= 0) for plan in plans]
            if turn >= 0:
                rest.append(seconds - sum(blocks))
            if on_progress is not None:
                on_progress((turn + 1) * len(order) + done + 1, (rounds + 1) * len(order))
        wholes.append([run(form) for form in whole_models])
    stages = [plan.times(cost.blocks[0]) for plan, cost in zip(plans, adapter.cost.stages, strict=True)]
    uncompressed, *compressed = (1e3 * statistics.median(times) for times in zip(*wholes[1:], strict=True))
    own = next(model.parameters())
    table = CostTable(
        model=adapter.name,
        method=str(method),
        batch_size=batch_size,
        dtype=str(own.dtype).removeprefix("torch."),
        device=processor(images.device),
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("torch", "diffrate_ext")},
        prefix=adapter.rules.prefix,
        gflops=flops(plain) / 1e9,
        fixed=max(0.0, 1e3 * statistics.median(rest)),
        stages=tuple(stages),
        uncompressed=uncompressed,
    )
    if schedule is None:
        return table
    return _with_what_is_missing(table, adapter.kept_numbers(schedule), compressed[0])


def _middling(model: nn.Module, method: Method) -> Schedule | None:
    """A schedule that removes tokens in most blocks; None where the method's rule has none."""
    for share in MIDDLING:
        try:
            return uniform_schedule(model, share, method=method)
        except InputValueError:
            continue
    return None


def _with_what_is_missing(table: CostTable, numbers: Sequence[KeptNumbers], measured: float) -> CostTable:
    """The table, with more time for removing tokens where a whole compressed model took more than it says.

    What a block takes beside others of the same size is not all: sizes that change cost memory its reuse.
    """
    missing = measured - table.total([[left for _, left in stage] for stage in numbers])
    blocks = 0
    for stage, kept in zip(table.stages, numbers, strict=True):
        before = stage.entering
        for _, left in kept:
            blocks, before = blocks + (left < before), left
    more = max(0.0, missing) / max(1, blocks)
    stages = (replace(one, reduction=tuple(time + more for time in one.reduction)) for one in table.stages)
    return replace(table, stages=tuple(stages))


class _Clock:
    """Moments of one pass: on a CPU as they are, on a GPU as its own events, read when all is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """Seconds from the first to the second moment of each pair."""
        if not self.on_cuda:
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


class _Profile(Plan):
    """One stage's blocks at one number of tokens after the other."""

    def __init__(self, method: Method, rules: TokenRules, stage: Stage, prunes: bool, clock: _Clock) -> None:
        self.method, self.rules, self.stage, self.prunes, self.clock = method, rules, stage, prunes, clock
        self.tokens = _numbers_to_try(stage)
        self.samples: dict[str, dict[int, list[float]]] = {
            piece: defaultdict(list) for piece in ("attention", "reduction", "mlp")
        }

    def begin(self, index: int, turn: int) -> None:
        self.now, self.turn = self.tokens[min(index, len(self.tokens) - 1)], turn
        self.watched: list[_Watched] = []

    def steps(self, tokens: int, training: bool) -> Sequence[NewStep]:
        self.begun = self.clock.mark()
        now, patches = self.now, self.now - self.stage.prefix
        fewer = max(self.stage.fewest, now - max(1, round(REMOVED * patches)))
        steps: list[NewStep] = []
        for index in range(len(self.stage.blocks)):
            first, removes = index == 0 and now < tokens, (index + self.turn) % 2 == 0 and fewer < now
            comes = tokens if first else now
            keep = partial(DropTokens, self.rules, now if self.prunes else comes, now)
            pruned = now - (now - fewer) // 2 if self.prunes and self.method.prunes_and_merges else now
            less = partial(self.method.step, self.rules, pruned, fewer) if removes and not first else None
            steps.append(partial(self._watch, keep, less))
        return steps

    def _watch(self, keep: NewStep, less: NewStep | None, before: TokenState) -> Step:
        self.watched.append(_Watched(keep(before), None if less is None else less(before), self.clock))
        return self.watched[-1]

    def finish(self, keep: bool) -> float:
        """Take down what the pass took. Returns the seconds of all blocks."""
        moments, begun = [], self.begun
        for step in self.watched:
            moments.append((begun, step.reduced))
            moments.append((step.reduced, step.added))
            begun = step.added
        durations = self.clock.between(moments)
        if keep:
            self._take_down(durations, [sum(self.clock.between(step.moments)) for step in self.watched])
        return sum(durations)

    def _take_down(self, durations: Sequence[float], reductions: Sequence[float]) -> None:
        """One sample of each piece: the mean over blocks, of which some are slow in every pass."""
        first = int(self.now < self.stage.tokens)  # the first block comes down to so many tokens, and does not count
        blocks = range(first, len(self.watched))
        keeping = [index for index in blocks if self.watched[index].less is None]
        removing = [index for index in blocks if self.watched[index].less is not None]
        samples: dict[str, list[float]] = {
            "attention": [durations[2 * index] for index in keeping],
            "mlp": [durations[2 * index + 1] for index in blocks],
        }
        if keeping:
            usual = statistics.mean(reductions[index] for index in keeping)
            samples["reduction"] = [reductions[index] - usual for index in removing]
        for piece, found in samples.items():
            if found:
                self.samples[piece][self.now].append(statistics.mean(found))

    def times(self, cost: BlockCost) -> StageTimes:
        def medians(piece: str) -> tuple[float, ...]:
            found = self.samples[piece]
            return tuple(1e3 * statistics.median(found[tokens]) if found[tokens] else 0.0 for tokens in self.tokens)

        attention, reduction, mlp = (medians(piece) for piece in ("attention", "reduction", "mlp"))
        return StageTimes(
            blocks=len(self.stage.blocks),
            per_token=cost.attention + cost.mlp,
            per_pair=cost.pairs,
            entering=self.stage.tokens,
            tokens=self.tokens,
            attention=attention,
            reduction=tuple(max(0.0, one) for one in reduction),
            mlp=mlp,
        )


class _Watched(Step):
    """A step that notes when its parts were done, and another that is timed beside it, whose result is dropped."""

    def __init__(self, keep: Step, less: Step | None, clock: _Clock) -> None:
        self.keep, self.less, self.clock = keep, less, clock
        self.moments: list[tuple[Any, Any]] = []
        """Of attention and reduction, as the second step does them; as the first does, where there is no second."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for step in (self.keep, self.less):
            if step is not None:
                step.positions = self.positions
        if self.less is not None:
            begun = self.clock.mark()
            self.less.attend(q, k, v, scale)
            self.moments.append((begun, self.clock.mark()))
        begun = self.clock.mark()
        out = self.keep.attend(q, k, v, scale)
        if self.less is None:
            self.moments.append((begun, self.clock.mark()))
        return out

    def reduce(self, x: Tensor, branch: Tensor) -> Tensor:
        return self._reduced(lambda step: step.reduce(x, branch))

    def reduce_and_norm(self, x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        return self._reduced(lambda step: step.reduce_and_norm(x, branch, norm))

    def _reduced(self, call: Callable[[Step], Any]) -> Any:
        if self.less is not None:
            begun = self.clock.mark()
            call(self.less)
            self.moments.append((begun, self.clock.mark()))
        begun = self.clock.mark()
        left = call(self.keep)
        self.reduced = self.clock.mark()
        if self.less is None:
            self.moments.append((begun, self.reduced))
        self.after, self.slot, self.source = self.keep.after, self.keep.slot, self.keep.source
        return left

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        x = super().add(x, branch)
        self.added = self.clock.mark()
        return x


def _numbers_to_try(stage: Stage) -> tuple[int, ...]:
    """Rising; near the end two neighbours, as sizes only count where tokens are gone."""
    if len(stage.blocks) < 2:
        return (stage.tokens,)
    spacing = max(1, -(-(stage.tokens - stage.fewest) // POINTS))
    if spacing > 4:  # kernels have steps at multiples of 8
        spacing = -(-spacing // 8) * 8
    multiples = range(-(-stage.fewest // spacing) * spacing, stage.tokens, spacing)
    return tuple(sorted({*multiples, stage.tokens - 1, stage.tokens}))
