"""Fine-tuning: the weights of a compressed model learn to do with the tokens that its schedule leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..answers import answer_of, has_classes
from ..compression.compress import compress
from ..compression.copies import compressed_copy, uncompressed_copy
from ..errors import DivergedError, InputValueError
from ..evaluation import Batch, split_batch
from ..methods import Method, method_of
from ..models import adapter_for
from ..schedule import Schedule
from ..seeding import seeded
from ..training.batches import Loader, fitting_labels, model_fingerprint, step_batches
from ..training.files import Fact
from ..training.interruption import saved_however_it_ends
from ..training.processes import Processes
from .drop_path import drop_paths
from .history import FinetuneFolder, FinetuneHistory, FinetuneRecord
from .interrupts import interrupts_held
from .quality import Quality, qualities
from .settings import FinetuneSettings

# the last part of the key of a step's own random choices, such as drop path, beside the loader's
_IN_THE_STEP = 1


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune` made of a model."""

    model: nn.Module = field(repr=False, compare=False)
    """Trained and compressed, in evaluation mode. ``diffrate_ext.restore`` takes the compression off."""
    schedule: Schedule
    """What it is compressed by, with the method."""
    history: FinetuneHistory
    uncompressed: Quality | None
    """Of the model that came, on the validation images; None without such images."""
    before: Quality | None
    """Of its compressed form."""
    after: Quality | None
    """Of the trained one."""
    steps_before: int
    """Steps made before this run, where it resumed another."""

    @property
    def gain(self) -> float | None:
        """By how much top-1 rose on the validation images (agreement without labels, cosine without classes). Below 0,
        fine-tuning did harm: see docs/finetune.md."""
        if self.before is None or self.after is None:
            return None
        return self.after.measure[1] - self.before.measure[1]


def finetune(
    model: nn.Module,
    schedule: Schedule,
    loader: Loader,
    settings: FinetuneSettings | None = None,
    *,
    method: str | Method | None = None,
    validation: Iterable[Batch] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    report: Callable[[FinetuneRecord], None] | None = None,
    fingerprint: Mapping[str, Fact] | None = None,
) -> FinetuneResult:
    """Train a model's weights under a schedule, so that they lose less accuracy by it.

    Tokens are dropped in training as they are at inference. What trains is a copy: the model that came stays as it is,
    and is the teacher where ``settings.distill`` asks for one. Parameters that need no gradient stay as they are.

    Where torch.distributed is initialised, the processes work together: each on its own batches, all towards the same
    weights; the first one reports, writes and evaluates.

    Args:
        model: a supported model (docs/models.md), trained, in float32.
        schedule: the tokens that each block keeps.
        loader: batches of (images, labels) or, with ``distill=1``, images alone, as for :func:`diffrate_ext.search`.
        settings: how to train; by default ``FinetuneSettings()``, the paper's recipe.
        method: how a block comes down to its tokens, as for :func:`diffrate_ext.compress`.
        validation: batches that training never sees, to evaluate on before and after, as
            :func:`diffrate_ext.evaluate` takes them; read twice.
        output: a folder for ``model.safetensors`` (the weights), ``schedule.json``, ``history.json`` and
            ``checkpoint.pt``, each of which is whole at any time. None: nothing is written.
        resume: continue the run in ``output``, if there is one, to the same result as if it had not been stopped. The
            model is to be the one that it started from.
        checkpoint_every: steps between checkpoints. One is written, too, when the run ends by an error or Ctrl-C.
        report: called after every step.
        fingerprint: what a resumed run must have in common with the one before, beside settings, schedule and model.

    Returns:
        the trained model, and how good it is beside what it was.

    Raises:
        InputTypeError: the model's family is not supported, or a batch is of another type.
        InputValueError: the schedule or the method does not fit the model; its weights are not float32, or all frozen;
            there are no images, or no labels where they are needed; a checkpoint is of a run with another fingerprint.
        FileExistsError: ``output`` holds a run, and ``resume`` is False.
        DivergedError: the loss or its gradient is not finite.
        KeyboardInterrupt: with a message that says what was done and how to continue.
    """
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise InputValueError(f"checkpoint_every must be a whole number of at least 1, got {checkpoint_every!r}")
    settings = settings or FinetuneSettings()
    method = method_of(schedule.method if method is None else method)
    schedule = replace(schedule, method=str(method))
    teacher = uncompressed_copy(model).eval()  # shares the caller's weights
    _check(teacher, settings)
    trained = compress(copy.deepcopy(teacher), schedule, method=method)
    run = _Finetuning(trained, teacher, settings, None if output is None else FinetuneFolder(output))
    facts = {"method": str(method), "kept": f"{schedule.after_pruning} {schedule.after_merging}"}
    run.start({**(fingerprint or {}), **facts, **model_fingerprint(teacher)}, resume)

    def quality_of(compressed: nn.Module) -> tuple[Quality, Quality] | tuple[None, None]:
        if validation is None:
            return None, None
        return run.processes.from_first(lambda: qualities(teacher, compressed, validation))

    # before training: images that do not fit are to be found now
    uncompressed, before = quality_of(compressed_copy(teacher, schedule, method=method))
    with drop_paths(trained, settings.drop_path):
        run.steps(loader, checkpoint_every, report)
    trained.eval()
    _, after = quality_of(trained)
    run.finish(schedule, uncompressed=uncompressed, before=before, after=after)
    return FinetuneResult(trained, schedule, run.history, uncompressed, before, after, run.steps_before)


def _check(model: nn.Module, settings: FinetuneSettings) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes & {torch.float16, torch.bfloat16}:
        raise InputValueError(
            "weights in half precision are too coarse for such small updates: fine-tune in float32 (model.float()), "
            "with amp=True for speed"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputValueError(
            "no parameter of the model needs a gradient: there is nothing to train (a RateSearch "
            "freezes the weights: restore(model) first)"
        )
    if not has_classes(model) and settings.distill != 1:
        raise InputValueError(
            "the model has no classes (num_classes=0), so labels say nothing about it: fine-tune with distill=1, which "
            "keeps its features"
        )


class _Finetuning:
    """The state of one run, from its first step to its last."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, settings: FinetuneSettings, folder: FinetuneFolder | None
    ) -> None:
        from timm.optim import param_groups_weight_decay

        self.model, self.teacher, self.settings, self.folder = model, teacher, settings, folder
        self.processes = Processes.current()
        self.has_classes = has_classes(model)
        own = next(model.parameters())
        self.device, self.dtype = own.device, own.dtype
        spared = adapter_for(model).undecayed
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=spared)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.history = FinetuneHistory(settings.steps)
        self.step = self.steps_before = 0
        self.saved: int | None = None  # the step of the checkpoint on disk
        self.whole = True  # False while weights and step count belong to different steps

    def start(self, fingerprint: Mapping[str, Fact], resume: bool) -> None:
        """Take over the state of the run in the folder, or see that there is none."""
        self.fingerprint = {**self.settings.fingerprint(), **fingerprint}
        state = self.processes.from_first(lambda: self._find_state(resume))
        if state is not None:
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = FinetuneHistory.from_dict(state["history"])
            self.step = self.steps_before = self.saved = state["step"]
        self.module = self.model
        if self.processes.world > 1:
            self.module = DistributedDataParallel(self.model, broadcast_buffers=False)

    def _find_state(self, resume: bool) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        self.folder.check(resume=resume)
        return self.folder.read_checkpoint(self.fingerprint) if resume else None

    def steps(self, loader: Loader, checkpoint_every: int, report: Callable[[FinetuneRecord], None] | None) -> None:
        """All steps that are left."""
        settings, rank = self.settings, self.processes.rank

        def stopped() -> str:
            return f"fine-tuning stopped after step {self.step} of {settings.steps}"

        def saved_to() -> object:
            return None if self.folder is None or self.saved is None else self.folder.checkpoint

        with saved_however_it_ends(self._save, stopped, saved_to):
            for batch in step_batches(loader, self.step, settings.steps, seed=settings.seed, rank=rank):
                record = self._train(batch)
                if self.step % checkpoint_every == 0:
                    self._save()
                if report is not None and self.processes.first:
                    report(record)

    def finish(self, schedule: Schedule, **found: Quality | None) -> None:
        """Write what the run leaves beside its checkpoint."""
        if self.folder is None or not self.processes.first:
            return
        self.folder.save_schedule(schedule)
        self.folder.save_weights(self.model)
        self.folder.save_history(self.history.to_json(**found))

    def _train(self, batch: Batch) -> FinetuneRecord:
        """One step: forward, backward and update."""
        settings, step = self.settings, self.step
        images, labels = split_batch(batch)
        if labels is None and settings.distill != 1:
            raise InputValueError("the loader gives images without labels: these need distill=1")
        images = images.to(self.device, self.dtype, non_blocking=True)
        self.module.train()
        self.optimizer.zero_grad()
        with seeded(settings.seed, step, self.processes.rank, _IN_THE_STEP, device=self.device):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.amp):
                said = self._teacher(images) if settings.distill > 0 else None
                found = answer_of(self.module(images)).float()
            loss, accuracy = self._lesson(found, labels, said)
            loss.backward()
        gradient = nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        parts = (loss, accuracy, gradient, loss.new_tensor(float(len(images))))
        numbers = self.processes.mean(torch.stack([part.detach().double() for part in parts]))
        # one wait for the device, and the same numbers in every process: all go on, or none
        mean_loss, mean_accuracy, norm, mean_images = numbers.tolist()
        if not math.isfinite(mean_loss + norm):
            raise DivergedError(
                f"step {step}: the loss or its gradient is not finite ({mean_loss:g}, {norm:g}); "
                + ("a lower learning rate may help" if step else "do the images or the weights hold NaN?")
            )
        lr = settings.lr_at(step, mean_images * self.processes.world)
        record = FinetuneRecord(step, mean_loss, mean_accuracy, norm, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with interrupts_held():
            self.whole = False
            self.optimizer.step()
            self.history = self.history.with_record(record)
            self.step += 1
            self.whole = True
        return record

    def _teacher(self, images: Tensor) -> Tensor:
        """What the uncompressed model says: probabilities, or features where it has no classes."""
        with torch.no_grad():
            said = answer_of(self.teacher(images)).float()
            return said.softmax(1) if self.has_classes else said

    def _lesson(self, found: Tensor, labels: Tensor | None, said: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of what the model says, and how much of it is right; of features 1 - cosine, and the cosine."""
        settings = self.settings
        if not self.has_classes:
            assert said is not None
            cosine = F.cosine_similarity(found, said).mean()
            return 1 - cosine, cosine
        loss = found.new_zeros(())
        if said is not None:
            loss = settings.distill * F.cross_entropy(found, said)
        if labels is not None:
            labels = fitting_labels(labels, found)
            if settings.distill < 1:
                taught = F.cross_entropy(found, labels, label_smoothing=settings.smoothing)
                loss = loss + (1 - settings.distill) * taught
        truth = labels if labels is not None else said
        assert truth is not None
        classes = truth.argmax(1) if truth.is_floating_point() else truth
        return loss, (found.argmax(1) == classes).float().mean()

    def _save(self) -> None:
        """Write the state after the last whole step, once."""
        if self.folder is None or not self.processes.first or not self.whole or self.step in (0, self.saved):
            return
        content = {
            "step": self.step,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
        }
        self.folder.write_checkpoint(content, self.fingerprint, self.history.to_json())
        self.saved = self.step
