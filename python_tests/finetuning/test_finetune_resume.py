"""A fine-tuning that is stopped, and continued to the very same weights."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_search import gflops_of, shuffled_loader, tiny_batches, tiny_model

from diffrate_ext import FinetuneSettings, finetune, uniform_schedule

STEPS = 9


def run(folder, *, resume=False, model=None, **options):
    """With dropout, drop path, and a loader that shuffles and adds noise: all random numbers matter."""
    model = tiny_model() if model is None else model
    changes = {name: options.pop(name) for name in ("lr", "seed") if name in options}
    settings = FinetuneSettings(**{"steps": STEPS, "lr": 0.1, "drop_path": 0.3, "distill": 0.5, "seed": 3, **changes})
    arguments = {"output": folder, "resume": resume, "checkpoint_every": 4, "validation": tiny_batches(2), **options}
    schedule = uniform_schedule(model, gflops_of(model, 0.6))
    return finetune(model, schedule, shuffled_loader(), settings, **arguments)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def assert_same(folder, expected):
    found, wanted = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for name in ("history.json", "schedule.json"):
        assert (folder / name).read_text() == (expected / name).read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


def test_the_random_numbers_matter(unbroken, tmp_path):
    run(tmp_path, seed=4)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path, unbroken))
    assert not any(torch.allclose(found[name], tensor) for name, tensor in wanted.items() if tensor.ndim > 1)


def test_ctrl_c_and_resume(unbroken, tmp_path):
    def interrupt(record):
        if record.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=rf"after step 5 of {STEPS}; .*{tmp_path}.*--resume"):
        run(tmp_path, report=interrupt)
    assert not (tmp_path / "model.safetensors").exists()
    assert run(tmp_path, resume=True).steps_before == 5
    assert_same(tmp_path, unbroken)


def test_ctrl_c_waits_for_the_end_of_an_update(unbroken, tmp_path, monkeypatch):
    update, calls = torch.optim.AdamW.step, []

    def interrupted(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return update(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after step 5 of"):
            run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(tmp_path, resume=True).steps_before == 5
    assert_same(tmp_path, unbroken)


def test_half_an_update_is_never_saved(unbroken, tmp_path, monkeypatch):
    update, calls = torch.optim.AdamW.step, []

    def failing(self, *arguments, **options):
        update(self, *arguments, **options)
        calls.append(None)
        if len(calls) == 6:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path)
    assert run(tmp_path, resume=True).steps_before == 4
    assert_same(tmp_path, unbroken)


def test_a_finished_run_stays_as_it_is(unbroken, tmp_path):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir()}
    result = run(unbroken, resume=True, report=lambda record: pytest.fail("a step was made"))
    assert result.steps_before == STEPS
    assert {path.name: path.read_bytes() for path in unbroken.iterdir()} == before


def test_a_run_is_not_overwritten(unbroken):
    with pytest.raises(FileExistsError, match=f"{unbroken} holds a fine-tuning already.*--resume"):
        run(unbroken)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"lr": 0.2}, "lr: 0.1 then, 0.2 now"),
        ({"method": "random"}, "method: 'diffrate' then, 'random' now"),
        ({"fingerprint": {"images": "others"}}, "images: None then, 'others' now"),
        ({"model": tiny_model(embed_dim=48)}, "weights: "),
    ],
)
def test_another_run_is_not_continued(options, difference, unbroken):
    with pytest.raises(ValueError, match=r"the fine-tuning in .* was started differently") as error:
        run(unbroken, resume=True, **options)
    assert difference in str(error.value)


def test_the_checkpoint_of_a_search_is_none_of_a_fine_tuning(tmp_path):
    torch.save({"format_version": 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is not the checkpoint of a fine-tuning in format version 1"):
        run(tmp_path, resume=True)
