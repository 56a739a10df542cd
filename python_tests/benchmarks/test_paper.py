"""The paper in small: its parts, and the whole command in its quick form, without what it downloads."""

from __future__ import annotations

import json
import math
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import evidence.runs as paper_runs
import numpy as np
import paper
import pytest
import torch
from evidence.claims import CLAIMS, Judged, better_than_random, judge
from evidence.dinov2 import LEARNED_FROM, SHOWN, Crops
from evidence.page import report
from evidence.random_schedules import random_schedule
from evidence.runs import SIMPLE, Outcome, Run, Runs
from evidence.statistics import Interval, paired, summarize
from evidence.subjects import Subject, train_probe
from evidence.tables import CPU, QUICK, Row, parts
from machine import describe
from numpy.typing import NDArray
from picture_files import write
from PIL import Image
from tiny_models import tiny_vit

from diffrate_ext import compressed_copy, flops, uniform_schedule
from diffrate_ext.images.sources import ImageSource, some_of

NAMES = ("a.png", "b.jpg")


class Squares(ImageSource):
    """Pictures of one colour each, in two classes: dark and bright."""

    where, classes = "squares", ["dark", "bright"]

    def __len__(self) -> int:
        return 12

    def read(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)), int(i >= 6)

    def name(self, i: int) -> str:
        return f"square {i}"


def tiny(classes: int) -> Any:
    model = tiny_vit(num_classes=classes)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    return model


@pytest.fixture(params=[2, 0], ids=["classes", "features"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject("squares", "Squares", lambda: tiny(request.param), Squares, Squares, Squares, 4, 8)


def outcome(errors: list[float], **others: Any) -> Outcome:
    facts: dict[str, Any] = {"hits": None, "agrees": None, "gflops": 1.0, "schedule": None, "searched_gflops": None}
    return Outcome(np.array(errors), **{**facts, **others})


def never(done: int, total: int) -> None:
    raise AssertionError("nothing is trained here")


def test_crops_of_all_photographs_in_turn(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.whl", "w") as file:
        for value, name in enumerate(NAMES):
            data = BytesIO()
            pixels = np.full((40, 60, 3), 200 * value, dtype=np.uint8)
            Image.fromarray(pixels).save(data, "png" if name.endswith("png") else "jpeg")
            file.writestr(f"skimage/data/{name}", data.getvalue())
    package, before = zipfile.ZipFile(tmp_path / "pictures.whl"), torch.get_rng_state()
    found = Crops(package, NAMES, 3, seed=0)
    means = [np.asarray(found.read(i)[0]).mean() for i in range(len(found))]
    assert [mean > 100 for mean in means] == [False, True] * 3
    assert found.read(0)[0].size == (224, 224)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_photograph_is_learned_from_and_shown() -> None:
    assert not set(SHOWN) & set(LEARNED_FROM)


def test_some_pictures_of_a_source() -> None:
    chosen = some_of(Squares(), [11, 0])
    assert [chosen.read(i)[1] for i in range(len(chosen))] == [1, 0]
    assert chosen.name(0) == "square 11"


def test_the_pictures_to_judge_by_are_spread(subject: Subject) -> None:
    batches = list(subject.test_batches())
    assert [len(labels) for _, labels in batches] == [8]
    assert batches[0][1].sum() == 4  # of both classes


def test_a_probe_tells_classes_apart() -> None:
    model = tiny(0)
    head = train_probe(model, Squares())
    model.reset_classifier(2)
    model.head.load_state_dict(head)
    pictures = Subject("squares", "Squares", lambda: model, Squares, Squares, Squares, 4, 12)
    ((images, labels),) = pictures.test_batches()
    with torch.no_grad():
        assert torch.equal(model(images).argmax(1), labels)


@pytest.mark.parametrize("method", ["diffrate", "diffrate:operations=merge", "tome"])
def test_random_schedules(method: str) -> None:
    model = tiny_vit()
    target = 0.75 * flops(model) / 1e9
    found = [random_schedule(model, target, method=method, seed=seed) for seed in (0, 1, 0)]
    assert found[0] == found[2] != found[1]
    for schedule in found:
        assert schedule.method == method
        assert (schedule.after_pruning is None) == (method != "diffrate")
        assert flops(model, schedule) / 1e9 == pytest.approx(target, rel=0.05)
        compressed_copy(model, schedule)(torch.randn(1, 3, 16, 16))


def test_a_run_is_judged_image_by_image(subject: Subject, tmp_path: Path) -> None:
    runs, run = Runs(subject, tmp_path), Run("diffrate", 0.75)
    for one in (Run(), run):
        runs.do(one, never)
    model = subject.model
    ((images, labels),) = subject.test_batches()
    schedule = uniform_schedule(model, 0.75 * flops(model) / 1e9)
    with torch.no_grad():
        whole, compressed = model(images), compressed_copy(model, schedule)(images)
    found = runs.outcome(run)
    assert found is not None
    assert found.schedule == schedule
    if subject.has_classes:
        assert found.hits is not None
        assert found.agrees is not None
        expected = torch.nn.functional.cross_entropy(compressed, labels, reduction="none")
        assert found.hits.tolist() == (compressed.argmax(1) == labels).double().tolist()
        assert found.agrees.tolist() == (compressed.argmax(1) == whole.argmax(1)).double().tolist()
    else:
        assert found.hits is None
        expected = 1 - torch.nn.functional.cosine_similarity(compressed, whole)
    assert found.errors == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_run_is_done_once(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(subject, tmp_path).do(Run(), never)
    again = Runs(subject, tmp_path)
    monkeypatch.setattr(again, "_compressed", never)
    again.do(Run(), never)
    assert again.has(Run())


def test_what_cannot_be_reached_is_said(subject: Subject, tmp_path: Path) -> None:
    runs = Runs(subject, tmp_path)
    runs.do(Run(), never)
    runs.do(Run("evit", 0.05), never)
    assert runs.outcome(Run("evit", 0.05)) is None


def test_every_run_has_a_file_of_its_own() -> None:
    for form in (QUICK, CPU):
        runs = {run for tables in parts(form).values() for part in tables for row in part.rows for run in row.runs}
        assert len({run.key for run in runs}) == len(runs)
        assert all(
            part.against in {row.label for row in part.rows} for tables in parts(form).values() for part in tables
        )


def test_rows_are_summed_up_over_seeds() -> None:
    hits: list[NDArray[np.float64]] = [np.array([1.0, 1.0]), np.array([1.0, 0.0])]
    found = summarize([outcome([1, 3], hits=hits[0], agrees=hits[1]), outcome([3, 5], hits=hits[1], agrees=hits[1])])
    assert (found.error, found.top1, found.agreement) == (3, 0.75, 0.5)
    assert found.error_spread == pytest.approx(math.sqrt(2))


def test_differences_are_of_the_same_images() -> None:
    theirs = outcome([1, 2, 30])
    at = paired([outcome([2, 3, 31])], [theirs])
    assert (at.mean, at.low, at.high) == pytest.approx((1, 1, 1))
    varied = paired([outcome([2, 3, 31.3])], [theirs])
    assert varied.high - varied.mean == pytest.approx(1.96 * np.std([1, 1, 1.3], ddof=1) / math.sqrt(3))
    seeds = paired([outcome([2, 3, 31]), outcome([4, 5, 33])], [theirs])
    assert seeds.high - seeds.mean == pytest.approx(1.96)  # whose means are 2 apart: a variance of 2, over 2 seeds


def test_claims_are_held_against_the_rows_that_they_name() -> None:
    wins = {
        "DiffRate, learned": 1.0,
        "DiffRate, learned, fine-tuned": 0.5,
        "learned": 1.0,
        "same share, all merged": 1.5,
    }

    def outcomes(row: Row) -> list[Outcome]:
        return [] if row.label == "EViT" else [outcome([wins.get(row.label, 2.0)] * 3)]

    judged = list(judge(QUICK, outcomes))
    assert {one.claim for one in judged} == {claim for claim in CLAIMS if claim.worse != ("EViT",)}
    for one in judged:
        better, worse = wins.get(one.claim.better, 2.0), min(wins.get(label, 2.0) for label in one.claim.worse)
        assert one.interval.mean == pytest.approx(better - worse)
        assert one.verdict == ("holds" if better < worse else "cannot be told")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-2, -1, "holds"), (-2, 1, "cannot be told"), (1, 2, "does not hold: the other way round")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    part = parts(QUICK)["Table 1"][0]
    assert Judged(CLAIMS[0], part, Interval((low + high) / 2, low, high)).verdict == verdict


def test_how_many_random_schedules_are_beaten() -> None:
    def outcomes(row: Row) -> list[Outcome]:
        return [outcome([1.0]), outcome([4.0]), outcome([5.0])] if "random" in row.label else [outcome([3.0])]

    assert better_than_random(QUICK, outcomes, "merge") == (2, 3)
    assert better_than_random(QUICK, lambda row: [], "merge") is None


def test_simple_schedules_differ(subject: Subject, tmp_path: Path) -> None:
    runs = Runs(subject, tmp_path)
    runs.do(Run(), never)
    found = []
    for kind in SIMPLE:
        runs.do(Run("diffrate", 0.7, kind), never)
        done = runs.outcome(Run("diffrate", 0.7, kind))
        assert done is not None
        found.append(done.schedule)
    assert all(one != other for i, one in enumerate(found) for other in found[:i])
    for kind, schedule in zip(SIMPLE, found, strict=True):
        assert schedule is not None
        assert schedule.after_pruning is not None
        merged_alone = schedule.after_pruning[1:] == schedule.after_merging[:-1]
        assert merged_alone == kind.endswith("all merged")


def test_each_seed_learns_its_own_schedule(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, learn = [], paper_runs.search

    def remember(*arguments: Any, **others: Any) -> Any:
        seeds.append(arguments[3].seed)
        return learn(*arguments, **others)

    monkeypatch.setattr(paper_runs, "search", remember)
    runs = Runs(subject, tmp_path)
    for run in (Run(), *(Run("diffrate", 0.7, "learned", 1, 8, seed=seed) for seed in (0, 3))):
        runs.do(run, lambda done, total: None)
    assert seeds == [0, 3]


def test_spreads_on_the_page(subject: Subject) -> None:
    hits: list[NDArray[np.float64]] = [np.array([1.0, 1.0]), np.array([1.0, 0.0])]

    def outcomes(row: Row) -> list[Outcome]:
        both = [outcome([1, 3], hits=one, agrees=one) for one in hits]
        return both[:1] if row.label == "" else both

    page = report({subject: (QUICK, outcomes, {})}, describe(torch.device("cpu")), "command")
    assert "| EViT | 75.00% ± 35.36 | 75.00% | 2.0000 ± 0.0000 |" in page


@pytest.mark.slow
def test_the_quick_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["paper.py", "--form", "quick", "--fashion-mnist", str(tmp_path / "none"), "--test-images", "40"]
    words += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    assert paper.main() == 0
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for heading in ("### Table 1: 50% of the FLOPs", "### Table 2", "### Table 4: (d)", "### Figure 5", "### Figure 6"):
        assert heading in page
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {row["table"] for row in content["subjects"]["fashion_mnist"]["rows"]} == set(parts(QUICK))
    for line in page.splitlines():
        image = line.partition("](")[2].rstrip(")")
        if line.startswith("!["):
            assert Image.open(tmp_path / "out" / image).size[0] > 300


@pytest.mark.slow
def test_a_folder_as_imagenets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for seed, name in enumerate(("n01440764", "n01443537")):
            write(tmp_path / "imagenet" / split / name / "picture.png", seed=seed)
    words = [
        "paper.py",
        "--form",
        "quick",
        "--imagenet",
        str(tmp_path / "imagenet"),
        "--model",
        "deit_tiny_patch16_224",
    ]
    words += ["--no-pretrained", "--batch-size", "2", "--test-images", "2"]
    words += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    assert paper.main() == 0
    assert "deit_tiny_patch16_224 on imagenet" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_schedules_of_a_run_come_back(subject: Subject, tmp_path: Path) -> None:
    runs, run = Runs(subject, tmp_path), Run("tome", 0.8)
    for one in (Run(), run):
        runs.do(one, never)
    found = runs.outcome(run)
    assert found is not None
    assert found.schedule == uniform_schedule(subject.model, 0.8 * flops(subject.model) / 1e9, method="tome")


def test_weights_are_tuned_under_the_schedule_of_the_same_run(tmp_path: Path) -> None:
    subject = Subject("squares", "Squares", lambda: tiny(2), Squares, Squares, Squares, 4, 8, tuning_lr=1.0)
    runs, run = Runs(subject, tmp_path), Run("dynamicvit", 0.8, predictor_steps=2, search_images=8, tuning_steps=3)
    weights = {name: value.clone() for name, value in subject.model.state_dict().items()}
    done: list[tuple[int, int]] = []
    for one in (Run(), run):
        runs.do(one, lambda *steps: done.append(steps))
    assert done == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]
    before, after = runs.outcome(Run("dynamicvit", 0.8, predictor_steps=2, search_images=8)), runs.outcome(run)
    assert before is not None
    assert after is not None
    assert before.schedule == after.schedule
    assert before.schedule is not None
    assert before.schedule.method.startswith("dynamicvit:predictors=")
    assert not np.array_equal(before.errors, after.errors)
    assert all(torch.equal(value, weights[name]) for name, value in subject.model.state_dict().items())
