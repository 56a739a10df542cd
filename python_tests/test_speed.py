"""From where on compression pays. No test looks at how long anything took."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from timm.models.metaformer import MetaFormer
from tiny_hugging_face import MODELS
from tiny_models import tiny_caformer, tiny_eva, tiny_vit

from diffrate_ext import flops, speed, timing, uniform_schedule
from diffrate_ext.compression.choice import NamedSchedule
from diffrate_ext.models import adapter_for
from diffrate_ext.running import UnavailableError
from diffrate_ext.speed import NotRun, Speed, best_of, break_evens, measure_speed
from diffrate_ext.speed_plot import draw_speeds
from diffrate_ext.timing import Benchmark


def measured(batch, speed_up, *, tokens=197, way="eager", name="60%", rate=100.0, spread=0.02):
    """A speed whose quartiles lie so far from the median, on a machine of so many images per second uncompressed."""
    result = Benchmark(
        batch_size=batch,
        rounds=5,
        gflops=0.6,
        uncompressed_gflops=1.0,
        seconds=batch / rate / speed_up,
        uncompressed_seconds=batch / rate,
        speed_up=speed_up,
        speed_up_quartiles=(speed_up - spread, speed_up + spread),
    )
    return Speed(name, "diffrate", way, tokens, result)


@pytest.mark.parametrize(
    ("speed_ups", "begins", "words"),
    [
        ({1: 1.2, 4: 1.5}, 1, "pays at every batch size tried (1, 4)"),
        ({16: 1.2}, 16, "pays at batch size 16"),
        ({16: 0.8}, None, "does not pay at batch size 16 (0.80x)"),
        ({1: 0.8, 4: 0.9}, None, "does not pay at batch size 1 (0.80x), 4 (0.90x)"),
        ({1: 0.8, 4: 1.1, 16: 1.5}, 4, "pays from batch size 4 on, not at 1 (0.80x)"),
        ({1: 0.8, 4: 1.01, 16: 1.5}, 16, "pays from batch size 16 on, not at 1 (0.80x), 4 (1.01x, within the noise)"),
        ({1: 1.2, 4: 0.9, 16: 1.5}, 16, "pays at batch size 1, 16, not at 4 (0.90x)"),
        ({1: 1.2, 4: 1.3, 16: 0.99}, None, "pays at batch size 1, 4, not at 16 (0.99x, within the noise)"),
    ],
)
def test_where_compression_pays(speed_ups, begins, words):
    shuffled = [measured(batch, speed_up) for batch, speed_up in reversed(speed_ups.items())]
    (found,) = break_evens(shuffled)
    assert found.begins_at == begins
    assert found.words == words
    assert found.speed_ups == speed_ups


def test_along_the_tokens_where_only_they_vary():
    (found,) = break_evens([measured(4, 0.9, tokens=50), measured(4, 1.3, tokens=197)])
    assert (found.axis, found.where, found.begins_at) == ("tokens", 4, 197)
    assert found.words == "pays from 197 tokens on, not at 50 (0.90x)"


def test_along_the_batch_sizes_for_each_number_of_tokens():
    found = break_evens([measured(batch, 1.3, tokens=tokens) for tokens in (50, 197) for batch in (1, 4)])
    assert [(one.axis, one.where) for one in found] == [("batch size", 50), ("batch size", 197)]


def test_each_schedule_and_way_apart():
    found = break_evens([measured(1, 1.3), measured(1, 0.8, way="graph"), measured(1, 1.1, name="80%")])
    assert [(one.name, one.way, one.begins_at) for one in found] == [
        ("60%", "eager", 1),
        ("60%", "graph", None),
        ("80%", "eager", 1),
    ]


def test_the_fastest_compressed_model_is_held_against_the_fastest_uncompressed():
    """Compiling helps the uncompressed model more than compression does."""
    speeds = [measured(1, 1.5), measured(1, 0.9, way="compiled", rate=200.0), measured(4, 1.2)]
    first, second = best_of([*speeds, measured(4, 1.1, name="80%")])
    assert (first.batch_size, first.uncompressed_way, first.compressed.way) == (1, "compiled", "compiled")
    assert first.speed_up == pytest.approx(180 / 200)
    assert second.speed_up == 1.2
    assert second.compressed.name == "60%"


def test_the_best_of_one_way_is_the_median_of_its_ratios():
    """And not the ratio of medians, of rounds in which the machine was faster or slower."""
    one = measured(1, 1.5)
    drifted = replace(one, measured=replace(one.measured, seconds=one.measured.seconds / 2))
    assert best_of([drifted])[0].speed_up == 1.5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_vit().eval()


@pytest.fixture
def schedules(model):
    return [NamedSchedule(share, uniform_schedule(model, share)) for share in ("90%", "70%")]


def test_every_batch_size_and_way_is_timed(model, schedules, monkeypatch):
    run, done = [], []

    def in_way(way, form, images):
        run.append((way, len(images)))
        return form, None

    monkeypatch.setattr(timing, "in_way", in_way)
    ways = ("eager", "compiled")
    speeds, not_run = measure_speed(
        model, schedules, batch_sizes=[1, 3], ways=ways, rounds=2, on_progress=lambda: done.append(1)
    )
    places = [(way, batch) for batch in (1, 3) for way in ways]
    assert run == [place for place in places for _ in range(3)]  # the uncompressed model and two others
    assert [(one.way, one.measured.batch_size) for one in speeds] == [place for place in places for _ in range(2)]
    assert [one.name for one in speeds] == ["90%", "70%"] * 4
    assert {one.tokens for one in speeds} == {17}
    assert not_run == []
    assert len(done) == 8


@pytest.mark.parametrize("build", [tiny_eva, tiny_caformer, MODELS["DINOv3"], MODELS["SigLIP"]])
@pytest.mark.parametrize("method", ["diffrate", "tome", "random"])
def test_every_family_and_method(build, method):
    model = build()
    if method != "diffrate" and isinstance(model, MetaFormer):
        method = "diffrate:operations=merge"
    named = NamedSchedule("90%", uniform_schedule(model, "90%", method=method))
    (found,), not_run = measure_speed(model, [named], batch_sizes=[2], rounds=1)
    assert (found.method, found.measured.batch_size, not_run) == (method, 2, [])
    assert found.tokens == adapter_for(model).stages[0].tokens
    assert found.measured.flops_ratio == pytest.approx(flops(model) / flops(model, named.schedule))


def test_what_cannot_be_run_is_told_and_no_graph_is_tried_again(model, schedules):
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    speeds, not_run = measure_speed(model, schedules, batch_sizes=[1, 2], ways=("graph", "eager"), rounds=1)
    assert [(one.way, one.measured.batch_size) for one in speeds[::2]] == [("eager", 1), ("eager", 2)]
    assert not_run == [NotRun("graph", 17, 1, "no GPU")]


def test_a_batch_that_is_too_large_for_the_memory_is_told(model, schedules, monkeypatch):
    def interleaved(calls, rounds, *, warmup, device):
        yield [1.0] * len(calls)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory\nand a long explanation")

    tried = []
    monkeypatch.setattr(speed, "random_images", lambda model, n: tried.append(n) or timing.random_images(model, n))
    monkeypatch.setattr(timing, "interleaved", interleaved)
    speeds, not_run = measure_speed(model, schedules, batch_sizes=[1, 2], rounds=2)
    assert not_run == [NotRun("eager", 17, 1, "CUDA out of memory")]
    assert {one.measured.batch_size for one in speeds} == {2}


def test_a_comparison_in_a_way_that_cannot_be_had(model, schedules):
    if torch.cuda.is_available():
        pytest.skip("a GPU")
    images = timing.random_images(model, 1)
    with pytest.raises(UnavailableError, match="no GPU"):
        list(timing.Comparison(model, [schedules[0].schedule], images, way="graph").run(1))


@pytest.mark.parametrize(
    ("speeds", "panels"),
    [
        ([measured(batch, 1.3, way=way) for batch in (1, 4) for way in ("eager", "graph")], 2),
        ([measured(4, 1.3, tokens=tokens, name=name) for tokens in (50, 197) for name in ("a", "b")], 2),
        ([measured(batch, 1.3, tokens=tokens) for batch in (1, 4) for tokens in (50, 197)], 4),
        ([measured(16, 1.3)], 2),
    ],
)
def test_the_plot_has_a_line_for_each_model_and_way(speeds, panels):
    figure = draw_speeds(speeds, "a model")
    assert len(figure.axes) == panels
    curves = {(one.name, one.way) for one in speeds}
    rates, gains = figure.axes[:2]
    assert len(rates.lines) == len(curves) + len({one.way for one in speeds})
    assert len(gains.lines) == len(curves) + 1  # and where nothing is gained
    figure.savefig(io.BytesIO())
