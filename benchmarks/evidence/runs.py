"""One model compressed in one way and judged on a subject's pictures. What was done is kept in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diffrate_ext import (
    FinetuneSettings,
    PredictorSettings,
    Schedule,
    SearchSettings,
    compressed_copy,
    finetune,
    flops,
    search,
    train_predictors,
    uniform_schedule,
)
from diffrate_ext.compression.costing import costing_of
from diffrate_ext.errors import InputValueError
from diffrate_ext.evaluation import split_batch
from diffrate_ext.methods import method_of
from diffrate_ext.rate_search.start import simple_schedules

from .random_schedules import random_schedule
from .subjects import Subject

SIMPLE = ("uniform", "same number, all merged", "same share, half pruned", "same share, all merged")
"""DiffRate's schedules that a search chooses its start from, in its order. Uniform: same number, half pruned."""
OnStep = Callable[[int, int], None]
"""Called after each step of a training with the steps that are done and their number."""


@dataclass(frozen=True)
class Run:
    """What is done to a model before it is judged. ``method=None``: nothing is compressed."""

    method: str | None = None
    share: float = 1.0
    """Of the uncompressed model's FLOPs."""
    schedule: str = "uniform"
    """"uniform", "random", "learned" or another of SIMPLE."""
    search_steps: int = 0
    search_images: int = 0
    predictor_steps: int = 0
    """Of DynamicViT's predictors."""
    tuning_steps: int = 0
    """Of fine-tuning the weights under the schedule."""
    seed: int = 0

    @property
    def key(self) -> str:
        """A file's name that says what was done."""
        if self.method is None:
            return "uncompressed"
        parts = [self.method.replace(":", "-").replace("=", "-").replace(",", "-"), f"{self.share:.0%}", self.schedule]
        if self.schedule == "learned":
            parts.append(f"{self.search_steps} steps {self.search_images} images")
        if self.predictor_steps:
            parts.append(f"predictors {self.predictor_steps}")
        if self.tuning_steps:
            parts.append(f"tuned {self.tuning_steps}")
        return " ".join([*parts, f"seed {self.seed}"])

    def with_seed(self, seed: int) -> Run:
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, image by image."""

    errors: NDArray[np.float64]
    """Cross-entropy in nats; without classes, 1 - cosine to the uncompressed model's features."""
    hits: NDArray[np.float64] | None
    """1 where the most probable class is the label; None without classes."""
    agrees: NDArray[np.float64] | None
    """1 where it is the uncompressed model's."""
    gflops: float
    schedule: Schedule | None
    searched_gflops: float | None
    """Where a search ended, before its rates were shifted to the target."""


class Runs:
    """A subject's runs, each done once and kept in ``folder``."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder / subject.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._uncompressed: Tensor | None = None

    def has(self, run: Run) -> bool:
        return self._path(run).exists()

    def outcome(self, run: Run) -> Outcome | None:
        """Of a run that was done; None where its FLOPs cannot be reached."""
        with np.load(self._path(run), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays["facts"]))
        if "impossible" in facts:
            return None
        schedule = facts["schedule"]
        return Outcome(
            arrays["errors"],
            arrays.get("hits"),
            arrays.get("agrees"),
            facts["gflops"],
            None if schedule is None else Schedule(**schedule),
            facts["searched_gflops"],
        )

    def do(self, run: Run, on_step: OnStep) -> None:
        """Do a run, unless that was done."""
        if self.has(run):
            return
        torch.manual_seed(run.seed)
        try:
            model, schedule, searched = self._compressed(run, on_step)
        except InputValueError as error:  # EViT, say, cannot go down as far as others
            if "cannot be reached" not in str(error):
                raise
            self._write(run, {"impossible": str(error)}, {})
            return
        outputs, labels = self._outputs(model)
        arrays = self._judged(outputs, labels, torch.from_numpy(self._reference()) if run.method else outputs)
        if run.method is None:
            arrays["outputs"] = outputs.numpy()
        facts = {
            "gflops": flops(self.subject.model, schedule) / 1e9,
            "schedule": None if schedule is None else vars(schedule),
            "searched_gflops": searched,
        }
        self._write(run, facts, arrays)

    def _write(self, run: Run, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
        temporary = self.folder / "being written.npz"
        np.savez_compressed(temporary, facts=np.array(json.dumps(facts)), **arrays)
        temporary.replace(self._path(run))

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.npz"

    def _reference(self) -> NDArray[np.float32]:
        with np.load(self._path(Run())) as file:
            return file["outputs"]

    def _compressed(self, run: Run, on_step: OnStep) -> tuple[nn.Module, Schedule | None, float | None]:
        if run.method is None:
            return self.subject.model, None, None
        if run.tuning_steps:
            return self._tuned(run, on_step)
        schedule, searched = self._schedule(run, on_step)
        return compressed_copy(self.subject.model, schedule), schedule, searched

    def _schedule(self, run: Run, on_step: OnStep) -> tuple[Schedule, float | None]:
        """And where a search ended before its rates were shifted to the target."""
        model, subject, method = self.subject.model, self.subject, run.method
        assert method is not None
        gflops = run.share * flops(model) / 1e9
        if run.schedule == "random":
            return random_schedule(model, gflops, method=method, seed=run.seed), None
        if run.schedule == "learned":
            steps = run.search_steps
            found = search(
                model,
                subject.search_batches(run.search_images, steps, run.seed),
                gflops,
                SearchSettings(steps=steps, soft_targets=True, seed=run.seed, method=method),
                report=lambda record: on_step(record.step + 1, steps),
            )
            return found.schedule, found.searched
        if run.schedule in SIMPLE[1:]:
            return list(simple_schedules(costing_of(model), gflops, method_of(method)))[
                SIMPLE.index(run.schedule)
            ], None
        if method == "dynamicvit":
            method = f"dynamicvit:predictors={self._predictors(run, gflops, on_step)}"
        return uniform_schedule(model, gflops, method=method), None

    def _predictors(self, run: Run, gflops: float, on_step: OnStep) -> Path:
        """The file of those that were trained for a run."""
        path, steps = self.folder / f"{run.key}.safetensors", run.predictor_steps
        batches = self.subject.search_batches(run.search_images, steps, run.seed)
        settings = PredictorSettings(steps=steps, seed=run.seed)
        train_predictors(
            self.subject.model, batches, gflops, settings, report=lambda step, _: on_step(step + 1, steps)
        ).save(path)
        return path

    def _tuned(self, run: Run, on_step: OnStep) -> tuple[nn.Module, Schedule | None, float | None]:
        """The weights fine-tuned under the schedule of the same run without that."""
        before = replace(run, tuning_steps=0)
        self.do(before, on_step)
        outcome = self.outcome(before)
        if outcome is None or outcome.schedule is None:
            raise InputValueError(f"the FLOPs of {before.key} cannot be reached")
        steps, subject = run.tuning_steps, self.subject
        tuned = finetune(
            subject.model,
            outcome.schedule,
            subject.tuning_batches(steps, run.seed),
            FinetuneSettings(steps=steps, lr=subject.tuning_lr, seed=run.seed),
            report=lambda record: on_step(record.step + 1, steps),
        )
        return tuned.model.eval(), outcome.schedule, outcome.searched_gflops

    @torch.inference_mode()
    def _outputs(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        device = next(model.parameters()).device
        outputs, labels = [], []
        for batch in self.subject.test_batches():
            images, truth = split_batch(batch)
            outputs.append(model(images.to(device)).float().cpu())
            if truth is not None:
                labels.append(truth)
        return torch.cat(outputs), torch.cat(labels) if labels else None

    def _judged(self, outputs: Tensor, labels: Tensor | None, reference: Tensor) -> dict[str, NDArray[Any]]:
        if labels is None or not self.subject.has_classes:
            return {"errors": (1 - F.cosine_similarity(outputs.double(), reference.double())).numpy()}
        best = outputs.argmax(1)
        return {
            "errors": F.cross_entropy(outputs.double(), labels, reduction="none").numpy(),
            "hits": (best == labels).double().numpy(),
            "agrees": (best == reference.argmax(1)).double().numpy(),
        }
