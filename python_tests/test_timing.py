"""benchmark: what is computed from the times, and what is timed. No test looks at how long anything took."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from diffrate_ext import InputValueError, embedded, flops, uniform_schedule
from diffrate_ext.timing import Comparison, benchmark, interleaved, random_images


@pytest.fixture
def model():
    torch.manual_seed(0)
    return embedded.build_model().eval()


@pytest.fixture
def schedule(model):
    return uniform_schedule(model, 0.2)


def test_interleaved_runs_every_call_once_a_round_each_time_starting_with_another():
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "abc"]
    rounds = list(interleaved(calls, 3, warmup=1))
    assert order == list("abc" + "abc" + "bca" + "cab")
    assert [len(times) for times in rounds] == [3, 3, 3]
    assert all(seconds >= 0 for times in rounds for seconds in times)


def test_interleaved_files_each_time_under_its_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds: float) -> None:
        clock[0] += seconds

    calls = [lambda: takes(1.0), lambda: takes(2.0), lambda: takes(4.0)]
    assert list(interleaved(calls, 3)) == [[1.0, 2.0, 4.0]] * 3


def test_results_are_medians_and_the_speed_up_the_median_of_the_ratios(model, schedule):
    comparison = Comparison(model, [schedule], torch.zeros(8, 1, 28, 28))
    # the machine was three times slower in the second round: the ratio of that round is none the worse
    comparison.seconds = [[4.0, 2.0], [12.0, 6.0], [5.0, 2.0], [6.0, 2.0], [4.0, 4.0]]
    (result,) = comparison.results()
    assert result.uncompressed_seconds == 5.0
    assert result.seconds == 2.0
    assert result.speed_up == 2.0
    assert result.speed_up_quartiles == (2.0, 2.5)
    assert result.rounds == 5
    assert result.images_per_second == 4.0
    assert result.uncompressed_images_per_second == 1.6
    assert result.gflops == flops(model, schedule) / 1e9
    assert result.flops_ratio == pytest.approx(0.351 / 0.2, rel=0.01)
    assert result.realised_gain == pytest.approx(2.0 / result.flops_ratio)


def test_results_before_any_round(model, schedule):
    with pytest.raises(InputValueError, match="nothing was timed"):
        Comparison(model, [schedule], torch.zeros(1, 1, 28, 28)).results()


def test_benchmark_times_both_forms_and_leaves_the_model_alone(model, schedule):
    images = torch.randn(3, 1, 28, 28)
    before = model(images)
    model.train()
    result = benchmark(model, schedule, images=images, rounds=2, warmup=0)
    assert result.batch_size == 3
    assert result.rounds == 2
    assert min(result.seconds, result.uncompressed_seconds) > 0
    assert model.training
    assert torch.equal(model.eval()(images), before)


def test_the_compressed_model_is_timed_compressed_and_the_other_is_not(model, schedule):
    comparison = Comparison(model, [schedule], torch.randn(2, 1, 28, 28))
    tokens = []
    for m in comparison.models:
        m.norm.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    list(comparison.run(1))
    kept = schedule.kept_numbers(197)[-1][1]
    assert sorted(set(tokens)) == [kept, 197]


def test_random_images_have_the_size_the_model_was_made_for():
    assert random_images(embedded.build_model(), 2).shape == (2, 1, 28, 28)
    assert random_images(timm.create_model("test_vit"), 1).shape == (1, 3, 160, 160)
    resized = timm.create_model("test_vit", img_size=(64, 96)).bfloat16()
    images = random_images(resized, 5)
    assert images.shape == (5, 3, 64, 96)
    assert images.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"images": torch.zeros(0, 1, 28, 28)}, "at least one image"),
    ],
)
def test_bad_input(model, schedule, arguments, message):
    with pytest.raises(InputValueError, match=message):
        benchmark(model, schedule, **arguments)


def test_a_schedule_for_another_model_is_refused():
    model = timm.create_model("test_vit")
    name = f"test_vit.{model.pretrained_cfg['tag']}"
    schedule = replace(uniform_schedule(model, 0.9 * flops(model) / 1e9), model="deit_small_patch16_224.fb_in1k")
    images = torch.randn(1, 3, 160, 160)
    with pytest.raises(InputValueError, match=f"made for deit_small_patch16_224.fb_in1k, and the model is {name}"):
        benchmark(model, schedule, images=images, rounds=1, warmup=0)
    for accepted, options in ((schedule, {"any_model": True}), (replace(schedule, model=name), {})):
        assert benchmark(model, accepted, images=images, rounds=1, warmup=0, **options).rounds == 1
