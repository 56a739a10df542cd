"""The search for a schedule: compression rates learned by gradient descent (DiffRate, section 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from os import PathLike
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..answers import answer_of, has_classes
from ..compression.copies import compressed_copy, uncompressed_copy
from ..compression.costing import Unit, costing_of
from ..compression.flops import flops
from ..compression.free_tokens import keep_free_tokens
from ..compression.patching import remove_plans
from ..compression.uniform import schedule_by_rule
from ..cost_table import CostTable
from ..errors import DivergedError, InputValueError
from ..evaluation import Batch, Evaluation, evaluate_all, split_batch
from ..methods import Method
from ..models import adapter_for
from ..schedule import Schedule
from ..seeding import seeded
from ..training.batches import Loader, fitting_labels, model_fingerprint, step_batches
from ..training.files import Fact, replacing
from ..training.interruption import saved_however_it_ends
from ..training.processes import Processes
from ..training.records import Measure
from .checkpoints import SearchFolder, SearchState
from .graph import Replayed, check_recordable, record_cuda_graph
from .history import SearchHistory, StepRecord, kept_after
from .rates import RateSearch, check_reachable, flops_loss
from .settings import SearchSettings
from .start import simple_schedules
from .target import along_target

# the last part of the key of a step's own random choices, such as dropout, beside the loader's
_IN_THE_STEP = 1

OFF_TARGET = 2e-3
"""The share of the target that rates held there may be off it: a few tokens in one block."""

START_BATCHES = 4
"""So many batches choose among the simple schedules to start from."""

Compute: TypeAlias = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class SearchResult:
    """What :func:`search` found."""

    schedule: Schedule
    history: SearchHistory
    evaluation: Evaluation | None
    """Of the model under the schedule on the validation images, in agreement with the uncompressed model; None without
    such images."""
    target: float
    """GFLOPs of one image, or milliseconds of a batch by the cost table."""
    unit: Unit
    searched: float
    """Where the search itself ended, in that unit, before its rates were shifted to the target."""
    cost: float
    """Of the schedule, in that unit."""
    gflops: float
    """Of the schedule."""
    steps_before: int
    """Steps made before this run, where it resumed another. Equal to ``settings.steps`` if that one was finished."""


def search(
    model: nn.Module,
    loader: Loader,
    gflops: float | str | None = None,
    settings: SearchSettings | None = None,
    *,
    speedup: float | None = None,
    latency: float | None = None,
    costs: CostTable | None = None,
    validation: Iterable[Batch] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 10,
    report: Callable[[StepRecord], None] | None = None,
    fingerprint: Mapping[str, Fact] | None = None,
) -> SearchResult:
    """Learn a schedule of ``gflops``, or of so much time, for a model from images.

    Only the compression rates train; the model itself is left as it is. The rates are held at the target from the first
    step on, or drawn there by a term in the loss (``settings.flops_loss``). At the end they are shifted to where the
    schedule is nearest to it: within 1 %, or as near as the granularity lets it be.

    Where torch.distributed is initialised, the processes work together: each on its own batches, all towards the same
    rates; the first one reports, writes and evaluates.

    Args:
        model: a supported model (docs/models.md), trained. One without classes (``num_classes=0``, or a transformers
            model that is no classifier, such as DINOv2) needs soft targets: the search then keeps its features, by
            their cosine.
        loader: batches of (images, labels) or, with soft targets, images alone: images (B, C, H, W) of the model's own
            size, labels (B,) of an integer dtype or probabilities (B, classes). Any iterable; it is iterated again and
            again. Or a function that takes a step and returns the batches from that step on, so that a resumed search
            skips none by iterating.
        gflops: multiply-accumulates of one image, in units of 1e9; or a share of the uncompressed model's, such
            as ``"60%"``.
        speedup: in place of GFLOPs, how many times as fast as uncompressed the model is to be, by ``costs``.
        latency: in place of GFLOPs, what a batch is to take, in milliseconds, by ``costs``.
        costs: of :func:`profile_model`.
        settings: how to search; by default ``SearchSettings()``.
        validation: batches to evaluate the schedule on, as :func:`diffrate_ext.evaluate` takes them.
        output: a folder for ``schedule.json``, ``history.json``, ``search.png`` and ``checkpoint.pt``, each of which is
            whole at any time. None: nothing is written.
        resume: continue the search in ``output``, if there is one, to the same result as if it had not been stopped.
            One that was finished goes on if the settings ask for more steps, from where its rates are; its schedule
            stays until the first new checkpoint.
        checkpoint_every: steps between checkpoints. One is written, too, when the search ends by an error or Ctrl-C.
        report: called after every step.
        fingerprint: what a resumed search must have in common with the one before, beside settings and model: the data.

    Returns:
        the schedule, how it came about, and how it does.

    Raises:
        InputTypeError: the model's family is not supported, or a batch is of another type.
        InputValueError: a part of the model is not supported; the method cannot be searched, or cannot run the model;
            the target cannot be reached; there are no images, or no labels; a checkpoint is of a search with another
            fingerprint; a CUDA graph was asked for and cannot be captured.
        FileExistsError: ``output`` holds a search, and ``resume`` is False.
        DivergedError: the loss is not finite.
        KeyboardInterrupt: with a message that says what was done and how to continue.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise InputValueError(f"checkpoint_every must be a whole number of at least 1, got {checkpoint_every!r}")
    settings = settings or SearchSettings()
    target = costing_of(model, costs).target(gflops, speedup=speedup, latency=latency)
    check_target(model, target, settings.granularity, method=settings.method, costs=costs)
    plain = uncompressed_copy(model)  # shares the weights; its modules are those that change
    rates = RateSearch(
        plain, settings.granularity, mask_gradient=settings.mask_gradient, method=settings.method, costs=costs
    )
    try:
        run = _Search(rates, target, settings, None if output is None else SearchFolder(output))
        run.start({**(fingerprint or {}), **model_fingerprint(plain)}, resume)
        searched = run.steps(loader, checkpoint_every, report)
        schedule = run.finish()
        searched_cost, cost = map(rates.costing.of_schedule, (searched, schedule))
        found_gflops = flops(plain, schedule) / 1e9
    finally:
        remove_plans(plain)
    evaluation = None
    if validation is not None:
        evaluation = run.processes.from_first(lambda: _evaluation(plain, schedule, rates.method, validation))
    unit = rates.costing.unit
    return SearchResult(
        schedule, run.history, evaluation, target, unit, searched_cost, cost, found_gflops, run.steps_before
    )


def check_target(
    model: nn.Module,
    target: float,
    granularity: int = 1,
    *,
    method: str | Method = "diffrate",
    costs: CostTable | None = None,
) -> None:
    """Raise InputValueError when no search can reach a target, with the range that it can reach."""
    plain = uncompressed_copy(model)
    rates = RateSearch(plain, granularity, method=method, costs=costs)
    try:
        check_reachable(rates, target)
    finally:
        remove_plans(plain)


def _evaluation(plain: nn.Module, schedule: Schedule, method: Method, validation: Iterable[Batch]) -> Evaluation:
    return evaluate_all([plain, compressed_copy(plain, schedule, method=method)], validation)[1]


class _Search:
    """The state of one search, from its first step to its schedule."""

    def __init__(self, rates: RateSearch, target: float, settings: SearchSettings, folder: SearchFolder | None) -> None:
        self.rates, self.target, self.settings, self.folder = rates, target, settings, folder
        self.processes = Processes.current()
        own = next(rates.model.parameters())
        self.device, self.dtype = own.device, own.dtype
        if settings.cuda_graph:
            check_recordable(rates.model, self.device, self.processes.world)
        self.logits = {name: p for name, p in rates.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.logits.values(), lr=settings.first_lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        if settings.start == "uniform":
            rates.set_schedule(schedule_by_rule(rates.costing, target, rates.method))
        self._return_to_target()
        self.direction = rates.tilt_direction()
        self.uncompressed = rates.costing.uncompressed
        stages = adapter_for(rates.model).stages
        tokens = tuple(stage.tokens for stage in stages for _ in stage.blocks)
        self.history = SearchHistory(target, self.uncompressed, settings.steps, tokens, unit=rates.costing.unit)
        self.step = self.steps_before = 0
        self.saved: int | None = None  # the step of the checkpoint on disk
        self.has_classes = has_classes(rates.model)
        if not self.has_classes and not settings.soft_targets:
            raise InputValueError(
                "the model has no classes (num_classes=0), so labels say nothing about it: search with soft targets "
                "(soft_targets=True), which keep its features"
            )
        self.answer: Tensor | None = None  # of the uncompressed model to one image: the shape of labels that fit

    def start(self, fingerprint: Mapping[str, Fact], resume: bool) -> None:
        """Take over the state of the search in the folder, or see that there is none."""
        self.fingerprint = {
            f"target in {self.rates.costing.unit}": self.target,
            **self.settings.fingerprint(),
            **fingerprint,
        }
        state = self.processes.from_first(lambda: self._find_state(resume))
        if state is not None:
            with torch.no_grad():
                for name, logits in self.logits.items():
                    logits.copy_(state.logits[name])
            self.optimizer.load_state_dict(state.optimizer)
            self.history = state.history.extended_to(self.settings.steps)
            self.step = self.steps_before = state.step
            self.saved = state.step
        self.snapshot = self._state()
        self.module: nn.Module = self.rates
        if self.processes.world > 1:  # it broadcasts the weights once; later only the logits' gradients travel
            self.module = DistributedDataParallel(self.rates, broadcast_buffers=False)

    def _find_state(self, resume: bool) -> SearchState | None:
        if self.folder is None:
            return None
        self.folder.check(resume=resume)
        return self.folder.load_state(self.fingerprint) if resume else None

    def _state(self) -> SearchState:
        logits = {name: p.detach().cpu().clone() for name, p in self.logits.items()}
        return SearchState(self.step, logits, copy.deepcopy(self.optimizer.state_dict()), self.history)

    def steps(self, loader: Loader, checkpoint_every: int, report: Callable[[StepRecord], None] | None) -> Schedule:
        """All steps that are left. Returns the schedule that the rates stand for after them."""
        compute: Compute = self._compute
        if self.settings.cuda_graph:  # not of self, which it refers to: its memory is to be free after the last step
            compute = Replayed(self._compute, partial(record_cuda_graph, self.device))
        settings = self.settings

        def stopped() -> str:
            return f"search stopped after step {self.snapshot.step} of {settings.steps}"

        with saved_however_it_ends(self._save, stopped, lambda: self._saved_to):
            batches = step_batches(loader, self.step, settings.steps, seed=settings.seed, rank=self.processes.rank)
            if self.step == 0 and settings.start == "best":
                first = list(islice(batches, START_BATCHES))
                self._choose_start(first)
                batches = chain(first, batches)
            for batch in batches:
                if not self.history.records:
                    self.history = replace(self.history, measure=self._measure_of(batch))
                record = self._train(batch, compute)
                if self.history.wants(self.step):
                    self.history = self.history.with_record(record)
                self.step += 1
                self.snapshot = self._state()
                if self.step % checkpoint_every == 0:
                    self._save()
                if report is not None and self.processes.first:
                    report(record)
        return self.rates.schedule()

    def finish(self) -> Schedule:
        """Shift the rates to the target, and write what the search found."""
        self.rates.project(self.target)
        return self.processes.from_first(self._keep_schedule)

    def _keep_schedule(self) -> Schedule:
        """The schedule in the folder, written if it is not there yet."""
        schedule = self.rates.schedule()
        if self.rates.costs is not None:
            schedule = keep_free_tokens(self.rates.model, schedule, self.rates.costs)
        if self.folder is None:
            return schedule
        finished = self.folder.load_schedule() if self.steps_before == self.settings.steps else None
        if finished is not None:
            return finished
        from .plot import draw_search

        figure = draw_search(self.history, schedule, self.rates.costing.of_schedule(schedule))
        with replacing(self.folder.plot) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        self.folder.save_schedule(schedule)  # the last file: where it is, the search is finished
        return schedule

    def _train(self, batch: Batch, compute: Compute) -> StepRecord:
        """One step: forward, backward and update."""
        settings, step = self.settings, self.step
        images, labels = self._on_device(batch)
        with_flops = torch.full((), float(step >= settings.warmup_steps), device=self.device)
        self.module.train()
        with seeded(settings.seed, step, self.processes.rank, _IN_THE_STEP, device=self.device):
            numbers, *gradients = compute(images, labels, with_flops)
        for logits, gradient in zip(self.logits.values(), gradients, strict=True):
            logits.grad = gradient
        # one wait for the device, and the same numbers in every process: all go on, or none
        loss, term, accuracy, cost, finite = self.processes.mean(numbers).tolist()
        if not math.isfinite(loss + term) or finite < 1:
            raise DivergedError(self._diverged(loss, term))
        after_pruning, after_merging = kept_after(self.rates.schedule())
        lr = self.optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        self.optimizer.step()
        self._return_to_target()
        return StepRecord(step, loss, term, accuracy, cost, lr, after_pruning, after_merging)

    @torch.no_grad()
    def _choose_start(self, batches: Sequence[Batch]) -> None:
        """Start from the simple schedule of the least loss on these batches, which then train, too."""
        self.rates.eval()
        placed = [self._on_device(batch) for batch in batches]
        rates = self.rates
        schedules, losses = list(simple_schedules(rates.costing, self.target, rates.method)), []
        for schedule in schedules:
            self.rates.set_schedule(schedule)
            losses.append(torch.stack([self._answer_to(images, labels)[0] for images, labels in placed]).mean())
        means = self.processes.mean(torch.stack(losses)).tolist()
        self.rates.set_schedule(schedules[means.index(min(means))])
        self._return_to_target()

    def _return_to_target(self) -> None:
        """Take back what a step, or the start, is off the target, where the search holds it."""
        if self.settings.holds_target:
            self.rates.project(self.target, OFF_TARGET)
            for logits in self.logits.values():  # the last digits of a tilt may depend on the processor
                self.processes.copy_first(logits)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """A batch's images and its labels, which were checked while the host has them."""
        images, labels = split_batch(batch)
        if labels is None and not self.settings.soft_targets:
            raise InputValueError("the loader gives images without labels: these need soft targets (soft_targets=True)")
        images = images.to(self.device, self.dtype, non_blocking=True)
        if labels is None or not self.has_classes:
            return images, None
        if self.answer is None:
            self.answer = self._teacher(images[:1])
        return images, fitting_labels(labels, self.answer.expand(len(images), -1))

    def _compute(self, images: Tensor, labels: Tensor | None, with_flops: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward; nothing here reads what the device computes.

        Args:
            images, labels: on the device.
            with_flops: 0-d; 1, or 0 to go without the FLOPs term.

        Returns:
            five numbers (the loss without the term for the cost, that term, accuracy, cost, 1 if all gradients are
            finite), and the gradients of the logits.
        """
        settings, rates = self.settings, self.rates
        self.optimizer.zero_grad()
        lesson, accuracy = self._answer_to(images, labels)
        spent = rates.cost()
        kind: Literal["relative", "absolute"] = "absolute" if settings.flops_loss == "absolute" else "relative"
        cost = with_flops * flops_loss(spent, self.target, self.uncompressed, settings.weight_of_flops, kind)
        held = settings.holds_target
        slopes = torch.autograd.grad(spent, list(self.logits.values()), retain_graph=True) if held else ()
        (lesson + cost).backward()

        gradients = [p.grad for p in self.logits.values() if p.grad is not None]
        if held:
            gradients = along_target(gradients, slopes, self.direction)
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        parts = (lesson, cost, accuracy, spent, finite)
        return torch.stack([part.detach().double() for part in parts]), *gradients

    def _answer_to(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and how much is right, of what the model says of images at the current rates."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            teacher = self._teacher(images) if self.settings.soft_targets else None
            found = answer_of(self.module(images)).float()
        return self._lesson(found, labels, teacher)

    def _lesson(self, found: Tensor, labels: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of what the model says, and how much of it is right; of features 1 - cosine, and the cosine."""
        if not self.has_classes:
            assert teacher is not None
            cosine = F.cosine_similarity(found, teacher).mean()
            return 1 - cosine, cosine
        targets, truth = _targets(labels, teacher)
        return F.cross_entropy(found, targets), (found.argmax(1) == truth).float().mean()

    def _teacher(self, images: Tensor) -> Tensor:
        """What the uncompressed model says: probabilities, or features where it has no classes."""
        with torch.no_grad(), self.rates.uncompressed() as plain:
            found = answer_of(plain(images)).float()
            return found.softmax(1) if self.has_classes else found

    def _measure_of(self, batch: Batch) -> Measure:
        """What can be said of how much is right."""
        if not self.has_classes:
            return "cosine"
        return "agreement" if split_batch(batch)[1] is None else "accuracy"

    def _diverged(self, loss: float, cost: float) -> str:
        message = (
            f"step {self.step}: the loss or its gradient is not finite (classification {loss:g}, FLOPs {cost:g}); "
            + ("a lower learning rate may help" if self.step else "do the images or the weights hold NaN?")
        )
        if self.folder is None or self.step == 0:
            return message
        return f"{message}. The state before this step is in {self.folder.checkpoint}"

    @property
    def _saved_to(self) -> str | None:
        """Where the state after the last whole step is; None where it is nowhere."""
        return None if self.folder is None or self.snapshot.step == 0 else str(self.folder.checkpoint)

    def _save(self) -> None:
        """Write the state after the last whole step, once."""
        if self.folder is None or not self.processes.first or self.snapshot.step in (0, self.saved):
            return
        self.folder.save_state(self.snapshot, self.fingerprint)
        self.saved = self.snapshot.step


def _targets(labels: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the logits are to be, and the class of each image."""
    if labels is None:
        assert teacher is not None
        return teacher, teacher.argmax(1)
    truth = labels.argmax(1) if labels.is_floating_point() else labels
    return labels if teacher is None else teacher, truth
