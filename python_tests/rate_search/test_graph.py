"""Searches that replay a recorded step: on the CPU by a stand-in for CUDA graphs, which shows all but the capture."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from recording import on_the_cpu, record
from searches import build
from tiny_models import tiny_images
from tiny_search import CLASSES, tiny_batches, tiny_model
from torch import Tensor, nn

from diffrate_ext import InputValueError, SearchSettings, search
from diffrate_ext.compression.flops import flops
from diffrate_ext.rate_search import graph, loop
from diffrate_ext.rate_search.graph import Replayed, check_recordable

STEPS = 5
SETTINGS = SearchSettings(steps=STEPS, lr=0.3, flops_loss="relative", warmup_steps=2)


def found(model: nn.Module, loader: Any, settings: SearchSettings, share: float = 0.6, **options: Any) -> Any:
    return search(model, loader, share * flops(model) / 1e9, settings, **options)


def one_hot(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(images, 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES) for images, labels in batches]


def only_images(batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [images for images, _ in batches]


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        pytest.param({}, tiny_batches(STEPS), id="labels"),
        pytest.param({}, one_hot(tiny_batches(STEPS)), id="probabilities"),
        pytest.param({"soft_targets": True}, tiny_batches(STEPS), id="soft targets beside labels"),
        pytest.param({"soft_targets": True}, only_images(tiny_batches(STEPS)), id="soft targets alone"),
        pytest.param({"amp": True}, tiny_batches(STEPS), id="mixed precision"),
        pytest.param({"amp": True, "soft_targets": True}, only_images(tiny_batches(STEPS)), id="both"),
        pytest.param({"flops_loss": "none", "warmup_steps": 0}, tiny_batches(STEPS), id="held at the target"),
        pytest.param({"weight_decay": 0.5, "flops_loss": "absolute"}, tiny_batches(STEPS), id="weight decay"),
    ],
)
def test_a_replayed_search_is_the_same(changes: Any, batches: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """With dropout, so that the random numbers matter, too."""
    settings = replace(SETTINGS, **changes)
    eager = found(tiny_model(), batches, settings, output=tmp_path / "eager")
    with on_the_cpu(monkeypatch) as replays:
        replayed = found(tiny_model(), batches, replace(settings, cuda_graph=True), output=tmp_path / "replayed")
    assert len(replays) == STEPS - 1
    assert replayed == eager
    logits, wanted = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["logits"] for name in ("replayed", "eager")
    )
    for name in wanted:
        assert torch.equal(logits[name], wanted[name])


@pytest.mark.parametrize("kind", ["mean pool", "distilled", "CAFormer"])
def test_other_models(kind: str, monkeypatch: Any) -> None:
    model = build(kind)
    batches = [(tiny_images(model) + step, torch.arange(3)) for step in range(3)]
    settings = SearchSettings(steps=3, lr=0.3)
    eager = found(model, batches, settings, share=0.9)
    with on_the_cpu(monkeypatch) as replays:
        assert found(model, batches, replace(settings, cuda_graph=True), share=0.9) == eager
    assert len(replays) == 2


def test_a_batch_of_another_size_is_computed(monkeypatch: Any) -> None:
    """Between replays, whose memory it must leave alone, and they its gradients."""
    images, labels = tiny_batches(1)[0]
    batches = [*tiny_batches(2), (images[:2], labels[:2]), *tiny_batches(2, seed=1)]
    eager = found(tiny_model(), batches, SETTINGS)
    with on_the_cpu(monkeypatch) as replays:
        assert found(tiny_model(), batches, replace(SETTINGS, cuda_graph=True)) == eager
    assert len(replays) == STEPS - 2


def test_the_graph_is_freed_with_its_search(monkeypatch: Any) -> None:
    """At once: its memory is that of a whole step, and the next search may need it."""
    made: list[weakref.ref[Replayed]] = []

    class Noted(Replayed):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr(loop, "Replayed", Noted)
    gc.disable()
    try:
        with on_the_cpu(monkeypatch):
            found(tiny_model(), tiny_batches(2), replace(SETTINGS, cuda_graph=True))
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_labels_of_another_kind_are_computed(monkeypatch: Any) -> None:
    batches: list[Any] = [*tiny_batches(2), *one_hot(tiny_batches(1)), *tiny_batches(2, seed=1)]
    eager = found(tiny_model(), batches, SETTINGS)
    with on_the_cpu(monkeypatch) as replays:
        assert found(tiny_model(), batches, replace(SETTINGS, cuda_graph=True)) == eager
    assert len(replays) == STEPS - 2


def test_labels_are_checked_before_a_replay(monkeypatch: Any) -> None:
    images, labels = tiny_batches(1)[0]
    batches = [(images, labels), (images, labels + CLASSES)]
    with on_the_cpu(monkeypatch) as replays, pytest.raises(InputValueError, match=rf"0 \.\. {CLASSES - 1}"):
        found(tiny_model(), batches, replace(SETTINGS, cuda_graph=True))
    assert not replays


@pytest.mark.parametrize("graph_first", [False, True])
def test_a_search_goes_on_with_or_without_graph(graph_first: bool, tmp_path: Any, monkeypatch: Any) -> None:
    batches = tiny_batches(STEPS)

    def interrupt(record: Any) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    unbroken = found(tiny_model(), batches, SETTINGS)
    with on_the_cpu(monkeypatch):
        with pytest.raises(KeyboardInterrupt):
            found(tiny_model(), batches, replace(SETTINGS, cuda_graph=graph_first), output=tmp_path, report=interrupt)
        settings = replace(SETTINGS, cuda_graph=not graph_first)
        resumed = found(tiny_model(), batches, settings, output=tmp_path, resume=True)
    assert (resumed.history, resumed.schedule) == (unbroken.history, unbroken.schedule)


def test_divergence_is_seen_in_a_replay(monkeypatch: Any) -> None:
    images, labels = tiny_batches(1)[0]
    batches = [(images, labels), (images, labels), (images * torch.nan, labels)]
    with on_the_cpu(monkeypatch), pytest.raises(Exception, match="step 2: the loss or its gradient is not finite"):
        found(tiny_model(), batches, replace(SETTINGS, cuda_graph=True))


# --- its parts


def test_a_replay_reads_its_arguments_anew() -> None:
    calls = []

    def scaled(x: Tensor, by: Tensor | None) -> tuple[Tensor, ...]:
        calls.append(None)
        return (x * 2 if by is None else x * by,)

    replayed = Replayed(scaled, record)
    for shift in range(3):
        x, by = torch.arange(4.0) + shift, torch.tensor(1.0 + shift)
        assert torch.equal(replayed(x, by)[0], x * by)
        if shift == 0:
            made = len(calls)
    assert len(calls) == made
    assert torch.equal(replayed(torch.ones(3), torch.tensor(5.0))[0], torch.full((3,), 5.0))
    assert torch.equal(replayed(torch.ones(4).double(), torch.tensor(5.0))[0], torch.full((4,), 5.0).double())
    assert torch.equal(replayed(torch.ones(4), None)[0], torch.full((4,), 2.0))
    assert len(calls) == made + 3


def test_the_callers_tensors_are_left_alone() -> None:
    replayed = Replayed(lambda x: (x + 1,), record)
    first = torch.zeros(2)
    replayed(first)
    replayed(torch.ones(2))
    assert torch.equal(first, torch.zeros(2))


def test_the_stand_in_finds_what_a_capture_refuses() -> None:
    for waiting in (lambda: (torch.ones(()) * torch.ones(2).sum().item(),), lambda: (torch.tensor(2.0),)):
        with pytest.raises(RuntimeError, match="while recording"):
            record(waiting)


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        (torch.device("cpu"), 1, "cuda_graph needs a model on a CUDA device; this one is on cpu"),
        (GPU, 2, "cuda_graph is for a search in one process; there are 2"),
    ],
)
def test_where_no_graph_can_be(device: torch.device, processes: int, message: str) -> None:
    check_recordable(tiny_model(), GPU, 1)
    with pytest.raises(InputValueError, match=message):
        check_recordable(tiny_model(), device, processes)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_refused(register: str) -> None:
    model = tiny_model()
    handle = getattr(model.blocks[1].mlp, register)(lambda *_: None)
    with pytest.raises(InputValueError, match=r"blocks\.1\.mlp has hooks, which a CUDA graph does not call"):
        check_recordable(model, GPU, 1)
    handle.remove()
    check_recordable(model, GPU, 1)


def test_a_search_on_the_cpu_is_told(tmp_path: Any) -> None:
    with pytest.raises(InputValueError, match="cuda_graph needs a model on a CUDA device"):
        found(tiny_model(), tiny_batches(), replace(SETTINGS, cuda_graph=True), output=tmp_path / "search")
    assert not (tmp_path / "search").exists()


class FailingCapture:
    """As ``torch.cuda.graph`` behaves: what fails within makes the end of the capture fail, too."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_capture_that_fails_says_why(out_of_memory: bool, monkeypatch: Any) -> None:
    cuda = mock.MagicMock()
    cuda.graph = FailingCapture
    monkeypatch.setattr(torch, "cuda", cuda)
    calls: list[None] = []

    def call() -> tuple[Tensor, ...]:
        calls.append(None)
        if len(calls) > graph.WARM_UP_CALLS:
            raise torch.OutOfMemoryError("no memory") if out_of_memory else RuntimeError("not permitted\nmore")
        return ()

    if out_of_memory:
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            graph.record_cuda_graph(GPU, call)
    else:
        with pytest.raises(InputValueError, match=r"captured in a CUDA graph \(not permitted\): search without"):
            graph.record_cuda_graph(GPU, call)
