from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from diffrate_ext.schedule import KeptNumbers, Schedule, same_model, scale_kept_numbers

NUMBERS = json.loads((Path(__file__).parents[1] / "diffrate_ext/data/published_schedules.json").read_text())
PUBLISHED = [(name, key) for name, schedules in NUMBERS.items() for key in schedules]


def obeys_operator(numbers: KeptNumbers, tokens: int, prefix: int) -> bool:
    """Whether ops.prune_merge takes these numbers: the rule in its documentation."""
    for k_p, k_m in numbers:
        if not (prefix + 1 <= k_m < k_p <= tokens or prefix <= k_m == k_p <= tokens):
            return False
        tokens = k_m
    return True


@settings(deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(0, 300))
def test_kept_numbers_are_running_minima_for_the_operator(data: st.DataObject, prefix: int, patches: int) -> None:
    blocks = data.draw(st.integers(1, 8))
    numbers = st.lists(st.integers(max(prefix, 1), 320), min_size=blocks, max_size=blocks)
    prune, merge = data.draw(st.none() | numbers), data.draw(numbers)
    assume(prefix + patches > 0)
    try:
        schedule = Schedule(prune, merge, prefix=prefix)
    except ValueError as error:
        assert "no patch to merge into" in str(error)  # noqa: PT017 - any other refusal is a failure
        assert prefix in merge
        return
    assert list(schedule.after_merging) == [
        min(*merge[: block + 1], *(prune or merge)[: block + 1]) for block in range(blocks)
    ]
    tokens = prefix + patches
    kept = schedule.kept_numbers(tokens)
    assert obeys_operator(kept, tokens, prefix)
    for block, (k_p, k_m) in enumerate(kept):
        seen = [tokens, *merge[:block], *(prune or [])[: block + 1]]
        assert k_p == min(seen)
        assert k_m == min(*seen, merge[block])


def test_a_block_that_cannot_merge_is_refused_and_one_that_prunes_as_much_is_not() -> None:
    with pytest.raises(ValueError, match=r"after_merging\[1\] = 2 leaves no patch.*after_pruning\[1\] = 2"):
        Schedule([9, 5], [8, 2], prefix=2)
    assert Schedule([9, 2], [8, 2], prefix=2).kept_numbers(10) == ((9, 8), (2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"after_pruning": [5], "after_merging": []}, ValueError, "one number per block, got none"),
        ({"after_pruning": [5, 4], "after_merging": [5]}, ValueError, "got 2 and 1"),
        (
            {"after_pruning": [5, 4.0], "after_merging": [5, 4]},
            TypeError,
            r"after_pruning\[1\] must be an integer, got 4.0",
        ),
        (
            {"after_pruning": [5, 4], "after_merging": [5, True]},
            TypeError,
            r"after_merging\[1\] must be an integer, got True",
        ),
        ({"after_merging": "54"}, TypeError, "after_merging must be a list of integers"),
        ({"after_merging": 5}, TypeError, "after_merging must be a list of integers"),
        ({"after_pruning": [5], "after_merging": [-1]}, ValueError, r"after_merging\[0\] = -1"),
        ({"after_merging": [0], "prefix": 0}, ValueError, "at least 1"),
        ({"after_merging": [5], "prefix": -1}, ValueError, "prefix must be 0 or more"),
        ({"after_merging": [5], "prefix": 1.5}, TypeError, "prefix must be an integer"),
        ({"after_merging": [4], "prefix": 5}, ValueError, r"prefix = 5"),
        ({"after_merging": [18], "grid": (4, 4)}, ValueError, r"grid \(4, 4\) has only 17 tokens"),
        ({"after_merging": [5], "grid": (4,)}, ValueError, "grid must be two positive numbers"),
        ({"after_merging": [5], "grid": (0, 4)}, ValueError, "grid must be two positive numbers"),
        ({"after_merging": [5, 4], "stages": (1, 2)}, ValueError, r"stages must be .* add up to 2, got \[1, 2\]"),
        ({"after_merging": [5, 4], "stages": (2, 0)}, ValueError, "stages must be numbers of blocks"),
        ({"after_merging": [5, 4], "stages": 2}, TypeError, "stages must be a list of integers"),
        ({"after_merging": [5], "model": 5}, TypeError, "model must be a string"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**arguments)


def test_any_sequence_of_integers_serves() -> None:
    schedule = Schedule(np.array([9, 7]), np.array([8, 6]))
    assert schedule == Schedule((9, 7), [8, 6])
    assert hash(schedule) == hash(Schedule([9, 7], [8, 6]))
    assert type(schedule.after_merging[0]) is int
    assert len(schedule) == 2


def test_fewer_tokens_than_the_prefix_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens = 1 is fewer than the 2 prefix tokens"):
        Schedule([5], [4], prefix=2).kept_numbers(1)


@pytest.mark.parametrize("prune", [None, [196, 190, 40]])
def test_save_and_load_give_the_same_schedule(tmp_path: Path, prune: list[int] | None) -> None:
    schedule = Schedule(prune, [197, 180, 30], prefix=1, grid=(14, 14), model="deit_small_patch16_224")
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule
    assert Schedule.load(str(tmp_path / "s.json")) == schedule
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["format_version"] == 2
    assert content["after_merging"] == [197, 180, 30] if prune is None else [196, 180, 30]
    assert isinstance(content["library_version"], str)


GOOD: dict[str, Any] = {
    "format_version": 2,
    "after_pruning": [5, 4],
    "after_merging": [5, 3],
    "prefix": 1,
    "grid": None,
    "model": None,
}
VERSION_1: dict[str, Any] = {
    "format_version": 1,
    "prune": [9, 5],
    "merge": [8, 6],
    "prefix": 1,
    "grid": None,
    "model": "a",
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"merge": [', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (json.dumps({**GOOD, "format_version": 3}).encode(), "format version 3.*reads versions 1 and 2"),
        (json.dumps({"after_merging": [5]}).encode(), "lacks format_version, after_pruning, prefix"),
        (json.dumps({"format_version": 1, "merge": [5]}).encode(), "lacks prune, prefix"),
        (json.dumps({**GOOD, "after_merging": [5, "3"]}).encode(), r"after_merging\[1\] must be an integer, got '3'"),
        (json.dumps({**GOOD, "after_merging": None}).encode(), "after_merging must be a list of integers"),
        (json.dumps({**GOOD, "after_merging": [5, 0]}).encode(), r"after_merging\[1\] = 0"),
        (json.dumps({**GOOD, "grid": 4}).encode(), "grid must be a list of integers"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json.*" + message):
        Schedule.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Schedule.load(tmp_path / "nowhere.json")


def load_version_1(tmp_path: Path, **changes: Any) -> Schedule:
    (tmp_path / "old.json").write_text(json.dumps({**VERSION_1, **changes}))
    return Schedule.load(tmp_path / "old.json")


def test_version_1_is_read(tmp_path: Path) -> None:
    assert load_version_1(tmp_path) == Schedule([9, 5], [8, 5], model="a")
    merging = {"prune": None, "merge": [16, 9, 7], "prefix": 0, "grid": [4, 4]}
    assert load_version_1(tmp_path, **merging) == Schedule(None, [16, 9, 7], 0, (4, 4), "a", (3,))


def test_stages_of_version_1_begin_where_numbers_rise(tmp_path: Path) -> None:
    """... but not to the full grid, which the last block of a stage may name."""
    merge = [16, 9, 3, 16, 4, 4]
    found = load_version_1(tmp_path, prune=None, merge=merge, prefix=0, grid=[4, 4])
    assert found == Schedule(None, [16, 9, 3, 3, 4, 4], prefix=0, grid=(4, 4), model="a", stages=(4, 2))


def test_stages_start_anew(tmp_path: Path) -> None:
    schedule = Schedule([9, 7, 9, 8, 3], [8, 6, 7, 9, 3], stages=(2, 3))
    assert (schedule.after_pruning, schedule.after_merging) == ((9, 7, 9, 7, 3), (8, 6, 7, 7, 3))
    assert schedule.kept_numbers(8) == ((8, 8), (7, 6), (8, 7), (7, 7), (3, 3))
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule


@pytest.mark.parametrize(("name", "gflops"), PUBLISHED)
@pytest.mark.filterwarnings("error")
def test_published_schedules_are_usable(name: str, gflops: str) -> None:
    schedule = Schedule.published(name, gflops)
    assert schedule == Schedule.published(name, float(gflops))
    (known,) = (known for known in Schedule.available(name) if known.gflops == float(gflops))
    assert known.model == name
    assert known.weights == schedule.model
    assert schedule == Schedule.published(known.weights, gflops)
    hierarchical = "CAFormer" in name
    assert (schedule.prefix, schedule.after_pruning is None) == ((0, True) if hierarchical else (1, False))
    tokens = 257 if "ViT-H" in name else 197 if "ViT" in name else 196
    assert schedule.grid is not None
    assert math.prod(schedule.grid) + schedule.prefix == tokens
    kept = schedule.kept_numbers(tokens)[: 18 if hierarchical else None]
    assert obeys_operator(kept, tokens, schedule.prefix)
    numbers = NUMBERS[name][gflops]
    assert kept[0] == (min(tokens, (numbers["prune"] or [tokens])[0]), numbers["merge"][0])
    if hierarchical:
        assert schedule.after_merging[18:] == (49, 49, 49)
        assert schedule.after_merging[16] == schedule.after_merging[17] < 196


@pytest.mark.parametrize(
    ("timm_name", "name", "gflops"),
    [
        ("deit_tiny_patch16_224", "ViT-T-DeiT", 0.8),
        ("deit_small_patch16_224", "ViT-S-DeiT", 2.9),
        ("deit_base_patch16_224.fb_in1k", "ViT-B-DeiT", 11.5),
        ("vit_base_patch16_224.mae", "ViT-B-MAE", 10),
        ("vit_base_patch16_224.mae", "ViT-B-MAE", "10.0"),
        ("vit_large_patch16_224.mae", "ViT-L-MAE", 42.3),
        ("vit_huge_patch14_224.mae", "ViT-H-MAE", 103.4),
        ("caformer_s36.sail_in1k", "CAFormer-S36", 5.6),
    ],
)
@pytest.mark.filterwarnings("error")
def test_timm_names_are_known(timm_name: str, name: str, gflops: float | str) -> None:
    found, same = Schedule.published(timm_name, gflops), Schedule.published(name, gflops)
    assert (found.after_pruning, found.after_merging) == (same.after_pruning, same.after_merging)
    assert found.model == timm_name


@pytest.mark.parametrize(
    ("timm_name", "weights"),
    [
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", r"vit_base_patch16_224\.mae \(in the paper: ViT-B-MAE\)"),
        ("vit_base_patch16_224", r"vit_base_patch16_224\.mae"),
        ("vit_small_patch16_224.augreg_in21k", r"deit_small_patch16_224\.fb_in1k"),
        ("caformer_s36.sail_in22k_ft_in1k", r"caformer_s36\.sail_in1k"),
    ],
)
def test_weights_of_another_training_are_warned_of(timm_name: str, weights: str) -> None:
    gflops = Schedule.available(timm_name)[0].gflops
    with pytest.warns(UserWarning, match=rf"schedule for {timm_name} was learned on {weights}"):
        assert Schedule.published(timm_name, gflops).model == timm_name


def test_unknown_published_schedules_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"9\.9 GFLOPs.*available: 2\.3, 2\.5, 2\.7, 2\.9, 3\.1"):
        Schedule.published("deit_small_patch16_224", 9.9)
    with pytest.raises(ValueError, match=r"'resnet50'.*ViT-S-DeiT.*deit_small_patch16_224"):
        Schedule.published("resnet50", 2.9)
    with pytest.raises(ValueError, match="gflops must be a number, got 'small'"):
        Schedule.published("ViT-S-DeiT", "small")


def test_what_is_published_is_listed() -> None:
    assert [(known.model, str(known.gflops)) for known in Schedule.available()] == [
        (name, key) for name, schedules in NUMBERS.items() for key in sorted(schedules, key=float, reverse=True)
    ]
    assert [known.gflops for known in Schedule.available("deit_small_patch16_224")] == [3.1, 2.9, 2.7, 2.5, 2.3]
    assert Schedule.available("resnet50") == []
    assert Schedule.available("caformer_s36.sail_in1k_384") == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224.fb_in1k", True),
        ("deit_small_patch16_224.fb_in1k", "deit_small_patch16_224", True),
        ("deit_small_patch16_224", None, True),
        ("deit_small_patch16_224", "deit_base_patch16_224", False),
        ("vit_base_patch16_224.mae", "vit_base_patch16_224.augreg2_in21k_ft_in1k", False),
    ],
)
def test_names_that_may_mean_the_same_weights(one: str | None, other: str | None, same: bool) -> None:
    assert same_model(one, other) == same_model(other, one) == same


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 3), st.data())
def test_scaled_numbers_keep_the_rates_and_the_rule(new_patches: int, prefix: int, data: st.DataObject) -> None:
    merge = data.draw(st.lists(st.integers(prefix + 1, 100), min_size=1, max_size=6))
    prune = data.draw(st.lists(st.integers(prefix + 1, 100), min_size=len(merge), max_size=len(merge)))
    numbers = Schedule(prune, merge, prefix=prefix).kept_numbers(100)
    scaled = scale_kept_numbers(numbers, 100, prefix + new_patches, prefix, prefix + 1)
    assert obeys_operator(scaled, prefix + new_patches, prefix)
    for before, after in zip(numbers, scaled, strict=True):
        for kept, new in zip(before, after, strict=True):
            assert 0 <= (new - prefix) - (kept - prefix) * new_patches / (100 - prefix) < 1


@pytest.mark.parametrize(
    ("new_tokens", "kept"), [(4, ((4, 4), (4, 2), (2, 2))), (2, ((2, 2),) * 3), (1, ((1, 1),) * 3)]
)
def test_scaled_numbers_leave_as_many_as_a_block_needs(new_tokens: int, kept: KeptNumbers) -> None:
    assert scale_kept_numbers(((49, 49), (49, 8), (8, 3)), 49, new_tokens, 0, 2) == kept


def test_pruning_to_the_prefix_stays_so_when_scaled() -> None:
    assert scale_kept_numbers(((17, 9), (1, 1)), 17, 5, 1, 2) == ((5, 3), (1, 1))


def test_json_nested_too_deep_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        Schedule.load(path)
