"""``--method`` of the commands that compress."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from command_line import QUICK, TEST_VIT, assert_is_a_drawing, fails, rows
from rich.console import Console
from rich.table import Table

from diffrate_ext import compressed_copy, embedded, uniform_schedule
from diffrate_ext.cli.common import schedules_named
from diffrate_ext.cli.main import main
from diffrate_ext.demo import add_names_column
from diffrate_ext.schedule import Schedule


@pytest.mark.parametrize("command", ["demo", "evaluate", "benchmark", "visualize"])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("dance", "method must be one of diffrate, tome, evit, dynamicvit, random, got 'dance'"),
        ("tome:speed=9", "method 'tome' has the options proportional_attention, got 'speed=9'"),
    ],
)
def test_a_method_that_is_not_there(command, method, message, capsys, monkeypatch, tmp_path):
    """Before any model is built, or any other argument is looked at."""
    monkeypatch.chdir(tmp_path)
    argv = [command, "--method", method, "--schedule", "/no/such/schedule.json"]
    assert f"argument --method: {message}" in fails(argv, capsys)


def named(of, **options):
    arguments = {"gflops": None, "schedule": None, "method": None, "any_model": False, "model": None, **options}
    return schedules_named(SimpleNamespace(**arguments), of)


def test_schedules_are_made_by_the_methods_rule():
    model = embedded.build_model()
    for method in ("tome", "evit", "random"):
        one, two = named(model, gflops=[0.25, 0.2], method=method)
        assert one.schedule == uniform_schedule(model, 0.25, method=method)
        assert (one.name, two.name) == (f"{method} 0.25 GFLOPs", f"{method} 0.2 GFLOPs")
    (one,) = named(model, gflops=[0.25])
    assert (one.name, one.schedule) == ("uniform 0.25 GFLOPs", uniform_schedule(model, 0.25))
    assert [one.name for one in named(model, method="tome")] == ["tome 80%", "tome 65%", "tome 50%"]


def test_published_schedules_are_diffrates():
    model = timm.create_model("deit_tiny_patch16_224")
    published = named(model, model="deit_tiny_patch16_224")
    assert all(one.name.startswith("published") for one in published)
    assert named(model, model="deit_tiny_patch16_224", method="diffrate") == published
    others = named(model, model="deit_tiny_patch16_224", method="random")
    assert [one.name for one in others] == [f"random {share}%" for share in (80, 65, 50)]


def test_a_schedules_own_method_counts_unless_another_is_named(tmp_path):
    model = embedded.build_model()
    uniform_schedule(model, 0.25, method="evit").save(tmp_path / "mine.json")
    (own,) = named(model, schedule=[tmp_path / "mine.json"])
    assert (own.name, own.schedule.method) == ("evit mine.json", "evit")
    (other,) = named(model, schedule=[tmp_path / "mine.json"], method="diffrate")
    assert (other.name, other.schedule.method) == ("mine.json", "diffrate")
    assert other.schedule.after_merging == own.schedule.after_merging


def test_an_evaluation_is_of_the_method(labelled, tmp_path, capsys):
    from diffrate_ext import evaluate
    from diffrate_ext.images.loading import evaluation_loader
    from diffrate_ext.images.sources import match_classes, open_images

    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    argv = ["evaluate", "--model", "test_vit", "--weights", str(tmp_path / "weights.pth"), "--images", str(labelled)]
    argv += ["--workers", "0", "--gflops", "0.025"]
    assert main([*argv, "--method", "tome:proportional_attention=false", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [row["method"] for row in found] == [None, "tome:proportional_attention=false"]
    loader = evaluation_loader(match_classes(open_images(labelled), 1000), model, batch_size=4)
    losses = {}
    for method in ("tome:proportional_attention=false", "tome"):
        schedule = uniform_schedule(model, 0.025, method=method)
        losses[method] = evaluate(compressed_copy(model, schedule), loader).loss
    assert found[1]["loss"] == pytest.approx(losses["tome:proportional_attention=false"], rel=1e-5)
    assert abs(losses["tome"] - found[1]["loss"]) > 1e-4 * found[1]["loss"]
    assert main([*argv, "--method", "tome"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["uncompressed", "tome 0.025 GFLOPs"]


def test_a_method_that_cannot_run_the_model(labelled, tmp_path, capsys):
    argv = ["evaluate", *TEST_VIT, "--images", str(labelled), "--workers", "0", "--method", "tome"]
    Schedule([101, *[20] * 5], [101, *[8] * 5]).save(tmp_path / "steep.json")
    assert "at most half" in fails([*argv, "--schedule", str(tmp_path / "steep.json")], capsys)


def test_what_is_timed_is_the_method(monkeypatch, capsys):
    from diffrate_ext import timing

    seen = []

    def copied(model, schedule, *, method=None):
        seen.append(str(method))
        return compressed_copy(model, schedule, method=method)

    monkeypatch.setattr(timing, "compressed_copy", copied)
    argv = ["benchmark", "--gflops", "0.2", "--rounds", "1", "--batch-size", "1", "--method", "random"]
    assert main([*argv, "--json"]) == 0
    assert seen == ["random"]
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["speeds"]] == ["random"]
    assert main(argv) == 0
    assert list(rows(capsys.readouterr().out)) == ["batch 1, eager", "uncompressed", "random 0.2 GFLOPs"]


@pytest.mark.parametrize("method", ["tome", "evit", "random"])
def test_a_picture_of_the_method(method, tmp_path, monkeypatch):
    from diffrate_ext import visualization

    seen = []

    def slots_of(model, images):
        seen.append(type(model._diffrate_plan.method).name)
        return token_slots(model, images)

    token_slots = visualization.token_slots
    monkeypatch.setattr(visualization, "token_slots", slots_of)
    picture = tmp_path / "tokens.png"
    argv = ["visualize", "--n-images", "1", "--gflops", "0.2", "--method", method, "--output", str(picture)]
    assert main(argv) == 0
    assert_is_a_drawing(picture)
    assert seen == [method]


def test_a_demo_of_a_method_searches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffrate_ext.demo.learned_schedule", lambda *_: pytest.fail("it learns DiffRate's rates"))
    argv = ["demo", *QUICK, "--method", "tome", "--output", str(tmp_path / "demo.png")]
    assert main(argv) == 0
    assert list(rows(capsys.readouterr().out))[-3:] == ["tome 80%", "tome 65%", "tome 50%"]


def test_other_weights_of_the_embedded_model(tmp_path, capsys):
    from safetensors.torch import save_file

    state = embedded.load_model().state_dict()
    state["head.bias"] = state["head.bias"] + torch.tensor([100.0] + [0.0] * 9)  # everything is a T-shirt
    save_file(state, tmp_path / "shirts.safetensors")
    argv = ["demo", *QUICK, "--gflops", "0.2", "--output", str(tmp_path / "demo.png")]
    assert main([*argv, "--weights", str(tmp_path / "shirts.safetensors")]) == 0
    shirts = (embedded.load_images("test")[1][:16] == 0).float().mean()
    assert rows(capsys.readouterr().out)["uncompressed"][2] == f"{shirts:.1%}"
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"head.bias": state["head.bias"]}, tmp_path / "part.pth")
    for name in ("text.safetensors", "part.pth"):
        error = fails([*argv, "--weights", str(tmp_path / name)], capsys)
        assert f"{name} do not load into the embedded model" in error


def test_a_long_name_leaves_room_for_the_numbers():
    table, text = Table(), io.StringIO()
    add_names_column(table)
    for heading in ("GFLOPs", "top-1", "loss", "agreement", "images/s", "speed-up"):
        table.add_column(heading)
    table.add_row("dynamicvit:predictors=diffrate_predictors.safetensors 60%", *(f"{i}23.45" for i in range(1, 7)))
    Console(file=text, width=80).print(table)
    assert all(f"{i}23.45" in text.getvalue() for i in range(1, 7))
