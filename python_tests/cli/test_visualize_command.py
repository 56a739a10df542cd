"""``diffrate visualize``."""

from __future__ import annotations

import pytest
from command_line import TEST_VIT, assert_is_a_drawing, fails

from diffrate_ext import demo, embedded, uniform_schedule, visualization
from diffrate_ext.cli.main import main
from diffrate_ext.compression.flops import flops
from diffrate_ext.schedule import Schedule


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, and the model and keywords that they were drawn with."""
    seen = []

    def draw(model, images, schedule, **options):
        figure = visualization.visualize(model, images, schedule, **options)
        seen.append((figure, model, schedule, options))
        return figure

    monkeypatch.setattr(demo, "visualize", draw)
    return seen


def run(tmp_path, *options):
    output = tmp_path / "tokens.png"
    assert main(["visualize", "--output", str(output), *options]) == 0
    return output


def test_a_moderate_schedule_is_drawn(drawn, tmp_path):
    run(tmp_path, "--n-images", "1")
    ((figure, model, schedule, _),) = drawn
    assert flops(model, schedule) == pytest.approx(0.65 * flops(model), rel=0.01)
    assert figure.get_suptitle().startswith("embedded ViT, DiffRate, uniform schedule: ")
    curves = [line.get_label() for line in figure.subfigs[1].axes[0].lines]
    assert [label.endswith("shown") for label in curves] == [False, False, True, False]


def test_of_schedules_that_are_as_near_the_last_is_drawn(drawn, tmp_path):
    model = embedded.build_model()
    uniform = uniform_schedule(model, 0.21)
    Schedule(uniform.after_pruning, [*uniform.after_merging[:-1], 30]).save(tmp_path / "learned.json")
    uniform.save(tmp_path / "uniform.json")
    uniform_schedule(model, 0.18).save(tmp_path / "strong.json")
    files = [str(tmp_path / f"{name}.json") for name in ("uniform", "learned", "strong")]
    run(tmp_path, "--n-images", "1", "--schedule", *files)
    assert ", learned.json schedule: " in drawn[0][0].get_suptitle()
    run(tmp_path, "--n-images", "1", "--schedule", files[1], files[0], files[2])
    assert ", uniform schedule: " in drawn[1][0].get_suptitle()


def test_blocks_and_paint(drawn, tmp_path):
    assert_is_a_drawing(run(tmp_path, "--n-images", "1", "--blocks", "1", "4", "12", "--paint", "hue"))
    ((figure, _, _, options),) = drawn
    titles = [axes.get_title().partition("\n")[0] for axes in figure.subfigs[0].axes]
    assert titles == ["input", "after block 1", "after block 4", "after block 12"]
    assert options["paint"] == "hue"


def test_random_weights_are_marked_in_the_figure(drawn, folder, tmp_path):
    run(tmp_path, *TEST_VIT, "--images", str(folder / "a.png"))
    run(tmp_path, "--n-images", "1")
    marked = ["random weights" in figure.get_suptitle() for figure, *_ in drawn]
    assert marked == [True, False]


def test_the_model_runs_where_it_is_told(tmp_path, monkeypatch, capsys):
    from torch import nn

    places = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *where, **_: places.append(where) or self)
    run(tmp_path, "--n-images", "1", "--device", "cpu:0")
    assert any(str(where[0]) == "cpu:0" for where in places if where)
    capsys.readouterr()
    assert "no such device: 'nowhere'" in fails(["visualize", "--device", "nowhere"], capsys)


def test_blocks_that_are_not_there(tmp_path, capsys):
    argv = ["visualize", "--n-images", "1", "--output", str(tmp_path / "tokens.png"), "--blocks"]
    assert "from 1 to 12, got [13]" in fails([*argv, "13"], capsys)
    assert "at least 1, got '0'" in fails([*argv, "0"], capsys)
