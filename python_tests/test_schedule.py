from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from timm.models.vision_transformer import VisionTransformer

from diffrate_ext.flops import flops
from diffrate_ext.schedule import Schedule, published_gflops, scale_steps

NUMBERS = json.loads((Path(__file__).parents[1] / "diffrate_ext/data/published_schedules.json").read_text())
PUBLISHED = [(name, key) for name, schedules in NUMBERS.items() for key in schedules]


def obeys_operator(steps: tuple[tuple[int, int], ...], tokens: int, prefix: int) -> bool:
    """Whether ops.prune_merge takes these numbers: the rule in its documentation."""
    for k_p, k_m in steps:
        if not (prefix + 1 <= k_m < k_p <= tokens or prefix <= k_m == k_p <= tokens):
            return False
        tokens = k_m
    return True


@settings(deadline=None)
@given(st.data(), st.integers(0, 5), st.integers(0, 300))
def test_steps_are_running_minima_that_the_operator_takes(data: st.DataObject, prefix: int, patches: int) -> None:
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
    tokens = prefix + patches
    steps = schedule.steps(tokens)
    assert obeys_operator(steps, tokens, prefix)
    for block, (k_p, k_m) in enumerate(steps):
        seen = [tokens, *merge[:block], *(prune or [])[: block + 1]]
        assert k_p == min(seen)
        assert k_m == min(*seen, merge[block])


def test_a_block_that_cannot_merge_is_refused_and_one_that_prunes_as_much_is_not() -> None:
    with pytest.raises(ValueError, match=r"merge\[1\] = 2 leaves no patch.*prune\[1\] = 2"):
        Schedule([9, 5], [8, 2], prefix=2)
    assert Schedule([9, 2], [8, 2], prefix=2).steps(10) == ((9, 8), (2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prune": [5], "merge": []}, ValueError, "one kept number per block, got none"),
        ({"prune": [5, 4], "merge": [5]}, ValueError, "got 2 and 1"),
        ({"prune": [5, 4.0], "merge": [5, 4]}, TypeError, r"prune\[1\] must be an integer, got 4.0"),
        ({"prune": [5, 4], "merge": [5, True]}, TypeError, r"merge\[1\] must be an integer, got True"),
        ({"merge": "54"}, TypeError, "merge must be a list of integers"),
        ({"merge": 5}, TypeError, "merge must be a list of integers"),
        ({"prune": [5], "merge": [-1]}, ValueError, r"merge\[0\] = -1"),
        ({"merge": [0], "prefix": 0}, ValueError, "at least 1"),
        ({"merge": [5], "prefix": -1}, ValueError, "prefix must be 0 or more"),
        ({"merge": [5], "prefix": 1.5}, TypeError, "prefix must be an integer"),
        ({"merge": [4], "prefix": 5}, ValueError, r"prefix = 5"),
        ({"merge": [18], "grid": (4, 4)}, ValueError, r"grid \(4, 4\) has only 17 tokens"),
        ({"merge": [5], "grid": (4,)}, ValueError, "grid must be two positive numbers"),
        ({"merge": [5], "grid": (0, 4)}, ValueError, "grid must be two positive numbers"),
        ({"merge": [5], "model": 5}, TypeError, "model must be a string"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**arguments)


def test_any_sequence_of_integers_serves() -> None:
    schedule = Schedule(np.array([9, 7]), np.array([8, 6]))
    assert schedule == Schedule((9, 7), [8, 6])
    assert hash(schedule) == hash(Schedule([9, 7], [8, 6]))
    assert type(schedule.merge[0]) is int
    assert len(schedule) == 2


def test_steps_refuse_fewer_tokens_than_the_prefix() -> None:
    with pytest.raises(ValueError, match="tokens = 1 is fewer than the 2 prefix tokens"):
        Schedule([5], [4], prefix=2).steps(1)


@pytest.mark.parametrize("prune", [None, [196, 190, 40]])
def test_save_and_load_give_the_same_schedule(tmp_path: Path, prune: list[int] | None) -> None:
    schedule = Schedule(prune, [197, 180, 30], prefix=1, grid=(14, 14), model="deit_small_patch16_224")
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json") == schedule
    assert Schedule.load(str(tmp_path / "s.json")) == schedule
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["format_version"] == 1
    assert isinstance(content["library_version"], str)


GOOD = {"format_version": 1, "prune": [5, 4], "merge": [5, 3], "prefix": 1, "grid": None, "model": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"merge": [', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (json.dumps({**GOOD, "format_version": 2}).encode(), "format version 2.*reads version 1"),
        (json.dumps({"merge": [5]}).encode(), "lacks format_version, prune, prefix"),
        (json.dumps({**GOOD, "merge": [5, "3"]}).encode(), r"merge\[1\] must be an integer, got '3'"),
        (json.dumps({**GOOD, "merge": None}).encode(), "merge must be a list of integers"),
        (json.dumps({**GOOD, "merge": [5, 0]}).encode(), r"merge\[1\] = 0"),
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


@pytest.mark.parametrize(("name", "gflops"), PUBLISHED)
def test_published_schedules_are_usable(name: str, gflops: str) -> None:
    schedule = Schedule.published(name, gflops)
    assert schedule == Schedule.published(name, float(gflops))
    assert float(gflops) in published_gflops(name)
    assert (schedule.prefix, schedule.prune is None) == ((0, True) if "CAFormer" in name else (1, False))
    tokens = 257 if "ViT-H" in name else 197 if "ViT" in name else 196
    assert schedule.grid is not None
    assert math.prod(schedule.grid) + schedule.prefix == tokens
    steps = schedule.steps(tokens)
    assert obeys_operator(steps, tokens, schedule.prefix)
    assert steps[0] == (min(tokens, (schedule.prune or [tokens])[0]), schedule.merge[0])


@pytest.mark.parametrize(
    ("timm_name", "name", "gflops"),
    [
        ("deit_tiny_patch16_224", "ViT-T-DeiT", 0.8),
        ("deit_small_patch16_224", "ViT-S-DeiT", 2.9),
        ("deit_base_patch16_224.fb_in1k", "ViT-B-DeiT", 11.5),
        ("vit_base_patch16_224.mae", "ViT-B-MAE", 10),
        ("vit_base_patch16_224", "ViT-B-MAE", "10.0"),
        ("vit_large_patch16_224.mae", "ViT-L-MAE", 42.3),
        ("vit_huge_patch14_224.mae", "ViT-H-MAE", 103.4),
        ("caformer_s36.sail_in1k", "CAFormer-S36", 5.6),
    ],
)
def test_timm_names_are_known(timm_name: str, name: str, gflops: float | str) -> None:
    found, same = Schedule.published(timm_name, gflops), Schedule.published(name, gflops)
    assert (found.prune, found.merge, found.model) == (same.prune, same.merge, timm_name)


def test_unknown_published_schedules_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"9\.9 GFLOPs.*available: 2\.3, 2\.5, 2\.7, 2\.9, 3\.1"):
        Schedule.published("deit_small_patch16_224", 9.9)
    with pytest.raises(ValueError, match=r"'resnet50'.*ViT-S-DeiT.*deit_small_patch16_224"):
        Schedule.published("resnet50", 2.9)
    with pytest.raises(ValueError, match="gflops must be a number, got 'small'"):
        Schedule.published("ViT-S-DeiT", "small")
    assert published_gflops("resnet50") == []
    assert published_gflops("caformer_s36.sail_in1k_384") == []
    assert published_gflops("deit_small_patch16_224") == [3.1, 2.9, 2.7, 2.5, 2.3]


@pytest.mark.parametrize("share", [0.5, 0.65, 0.9, 1.0])
def test_uniform_removes_the_same_number_everywhere_and_meets_the_target(share: float) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    target = share * flops(model) / 1e9
    schedule = Schedule.uniform(model, target)
    assert schedule.gflops(model) == pytest.approx(target, rel=0.01)
    assert schedule.grid == (14, 14)
    assert schedule.model == "deit_small_patch16_224.fb_in1k"
    steps = schedule.steps(197)
    assert steps[0] == (197, 197)
    removed = [before[1] - after[1] for before, after in pairwise(steps)]
    removed = removed[:-1] if steps[-1][1] == 2 else removed  # there may be fewer to remove in the last block
    assert max(removed) - min(removed) <= 1
    for (_, before), (k_p, k_m) in pairwise(steps):
        assert abs((before - k_p) - (k_p - k_m)) <= 1


def test_uniform_only_merges_the_inner_blocks_of_a_caformer() -> None:
    with torch.device("meta"):
        model = timm.create_model("caformer_s36")
    schedule = Schedule.uniform(model, 6.0)
    assert schedule.gflops(model) == pytest.approx(6.0, rel=0.01)
    assert schedule.prune is None
    assert schedule.merge[0] == 196
    assert schedule.merge[17] == schedule.merge[16] < 196
    assert schedule.merge[18:] == (49, 49, 49)


@pytest.mark.parametrize("gflops", [0, 0.0001, 99, float("nan")])
def test_uniform_refuses_what_cannot_be_reached(gflops: float) -> None:
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match=r"GFLOPs cannot be reached: the model takes .* uncompressed"):
        Schedule.uniform(model, gflops)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 3), st.data())
def test_scaled_steps_keep_the_rates_and_the_rule(new_patches: int, prefix: int, data: st.DataObject) -> None:
    merge = data.draw(st.lists(st.integers(prefix + 1, 100), min_size=1, max_size=6))
    prune = data.draw(st.lists(st.integers(prefix + 1, 100), min_size=len(merge), max_size=len(merge)))
    steps = Schedule(prune, merge, prefix=prefix).steps(100)
    scaled = scale_steps(steps, 100, prefix + new_patches, prefix)
    assert obeys_operator(scaled, prefix + new_patches, prefix)
    for before, after in zip(steps, scaled, strict=True):
        for kept, new in zip(before, after, strict=True):
            assert 0 <= (new - prefix) - (kept - prefix) * new_patches / (100 - prefix) < 1


def test_json_nested_too_deep_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        Schedule.load(path)
