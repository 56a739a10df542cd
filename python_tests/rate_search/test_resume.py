"""A search that is killed, and continued to the same result."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_search import STEPS, search_once, shuffled_loader, tiny_model

from diffrate_ext.compression.flops import flops
from diffrate_ext.rate_search.loop import SearchResult, search
from diffrate_ext.rate_search.settings import SearchSettings
from diffrate_ext.schedule import Schedule

SCRIPT = Path(__file__).parents[1] / "tiny_search.py"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a search that nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    search_once(folder)
    return folder


def logits_in(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["logits"]


def assert_same_search(folder: Path, expected: Path) -> None:
    assert Schedule.load(folder / "schedule.json") == Schedule.load(expected / "schedule.json")
    found, wanted = logits_in(folder), logits_in(expected)
    assert found.keys() == wanted.keys() != set()
    for name, logits in wanted.items():
        assert logits.abs().max() > 0.1  # the search moved
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-5)
    assert (folder / "history.json").read_text() == (expected / "history.json").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.parametrize(
    ("when", "steps_kept"),
    [
        ("between checkpoints", 6),
        ("while a checkpoint is written", 3),
        ("before the history is written", 6),
        ("before the schedule is written", STEPS),
    ],
)
def test_killed_and_resumed(when, steps_kept, unbroken, tmp_path):
    folder = tmp_path / "search"
    killed = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), when], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "schedule.json").exists()
    result = search_once(folder, resume=True)
    assert result.steps_before == steps_kept
    assert_same_search(folder, unbroken)


def test_the_random_numbers_matter(unbroken, tmp_path):
    """What the other tests rely on: another order, noise or dropout leads elsewhere."""
    model = tiny_model()
    search(model, shuffled_loader(), 0.6 * flops(model) / 1e9, SearchSettings(STEPS, lr=0.2, seed=4), output=tmp_path)
    found, wanted = logits_in(tmp_path), logits_in(unbroken)
    assert all((found[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)


def test_ctrl_c_writes_a_checkpoint(unbroken, tmp_path):
    def interrupt(record):
        if record.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=rf"after step 5 of {STEPS}; .*{tmp_path}.*--resume"):
        search_once(tmp_path, report=interrupt)
    assert search_once(tmp_path, resume=True).steps_before == 5
    assert_same_search(tmp_path, unbroken)


def test_ctrl_c_within_a_step_keeps_the_last_whole_one(unbroken, tmp_path, monkeypatch):
    update, calls = torch.optim.AdamW.step, []

    def interrupted(self, *arguments, **options):
        calls.append(None)
        update(self, *arguments, **options)
        if len(calls) == 5:
            raise KeyboardInterrupt  # the logits have moved, the step is not over

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after step 4 of"):
            search_once(tmp_path)
    assert search_once(tmp_path, resume=True).steps_before == 4
    assert_same_search(tmp_path, unbroken)


def test_a_failing_loader_loses_nothing(tmp_path):
    model = tiny_model()

    def failing(start):
        for i, batch in enumerate(shuffled_loader()):
            if i == 4:
                raise ValueError("a corrupt picture")
            yield batch

    with pytest.raises(ValueError, match="a corrupt picture"):
        search(model, failing, 0.6 * flops(model) / 1e9, SearchSettings(STEPS), output=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_a_finished_search_stays_as_it_is(unbroken):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    result = search_once(unbroken, resume=True, report=lambda record: pytest.fail("a step was made"))
    assert result.steps_before == STEPS
    assert result.schedule == Schedule.load(unbroken / "schedule.json")
    assert {path.name: path.read_bytes() for path in unbroken.iterdir()} == before


def test_resuming_nothing_starts(unbroken, tmp_path):
    assert search_once(tmp_path, resume=True).steps_before == 0
    assert_same_search(tmp_path, unbroken)


def extend(folder: Path, steps: int, **options: Any) -> SearchResult:
    model, settings = tiny_model(), SearchSettings(steps, lr=0.1, seed=3)
    options = {"output": folder, "resume": True, "checkpoint_every": 3, **options}
    return search(model, shuffled_loader(), 0.6 * flops(model) / 1e9, settings, **options)


def test_a_finished_search_goes_on_to_more_steps(unbroken, tmp_path):
    folder = tmp_path / "search"
    shutil.copytree(unbroken, folder)
    steps: list[int] = []
    result = extend(folder, STEPS + 4, report=lambda record: steps.append(record.step))
    assert steps == [12, 13, 14, 15]
    assert result.steps_before == STEPS
    assert [record.step for record in result.history.records] == list(range(STEPS + 4))
    assert result.history.steps == STEPS + 4
    assert result.history.records[:STEPS] == search_once(unbroken, resume=True).history.records
    assert result.history.records[STEPS].lr == SearchSettings(STEPS + 4, lr=0.1).lr_at(STEPS)
    found, before = logits_in(folder), logits_in(unbroken)
    assert any((found[name] - before[name]).abs().max() > 1e-3 for name in before)
    assert Schedule.load(folder / "schedule.json") == result.schedule
    assert extend(folder, STEPS + 4, report=lambda _: pytest.fail("a step was made")).schedule == result.schedule


def test_the_old_schedule_does_not_pass_for_that_of_an_extended_search(unbroken, tmp_path):
    """Not even if the extension is stopped between its last step and its schedule."""
    folder = tmp_path / "search"
    shutil.copytree(unbroken, folder)

    def stop(record):
        if record.step == STEPS:
            assert (folder / "schedule.json").exists()  # no new checkpoint yet
        if record.step == STEPS + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(folder, STEPS + 4, report=stop)
    assert not (folder / "schedule.json").exists()
    assert extend(folder, STEPS + 4).steps_before == STEPS + 4
    assert (folder / "schedule.json").exists()


def test_a_search_is_not_overwritten(unbroken):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    with pytest.raises(FileExistsError, match=f"{unbroken} holds a search already.*--resume"):
        search_once(unbroken)
    assert {path.name: path.read_bytes() for path in unbroken.iterdir()} == before


@pytest.mark.parametrize(
    ("model", "share", "settings", "fingerprint", "difference"),
    [
        ({}, 0.6, {"lr": 0.1}, None, "lr: 0.2 then, 0.1 now"),
        ({}, 0.6, {"steps": 11}, None, "steps: 12 then, 11 now"),
        ({}, 0.6, {"steps": 20, "seed": 4}, None, "seed: 3 then, 4 now"),
        ({}, 0.5, {}, None, "target in GFLOPs: "),
        ({"depth": 5}, 0.6, {}, None, "blocks: 4 then, 5 now"),
        ({"num_classes": 6}, 0.6, {}, None, "weights: "),
        ({}, 0.6, {}, {"images": "others"}, "images: None then, 'others' now"),
    ],
)
def test_another_search_is_not_continued(model, share, settings, fingerprint, difference, unbroken):
    model = tiny_model(**model)
    settings = SearchSettings(**{"steps": STEPS, "lr": 0.2, "seed": 3, **settings})
    with pytest.raises(ValueError, match="was started differently") as error:
        search(model, [], share * flops(model) / 1e9, settings, output=unbroken, resume=True, fingerprint=fingerprint)
    assert difference in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"half"])
def test_a_broken_checkpoint_is_named(content, unbroken, tmp_path):
    if content == b"half":
        whole = (unbroken / "checkpoint.pt").read_bytes()
        content = whole[: len(whole) // 2]
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'checkpoint.pt'} is not the checkpoint of a search"):
        search_once(tmp_path, resume=True)


def test_a_tensor_file_of_another_kind_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is not the checkpoint of a search"):
        search_once(tmp_path, resume=True)
