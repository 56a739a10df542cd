"""What a search tells while it runs, and its picture."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from diffrate_ext.rate_search.history import SearchHistory, StepRecord
from diffrate_ext.rate_search.plot import draw_search
from diffrate_ext.rate_search.report import all_reports, progress_report, tensorboard_report
from diffrate_ext.schedule import Schedule
from diffrate_ext.training.progress import LINES


def record(step: int, *, prune: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        loss=2 - 0.01 * step,
        flops_loss=0.5,
        accuracy=0.25,
        cost=3.0,
        lr=0.1,
        after_pruning=(65, 60 - step // 4, 50 - step // 4) if prune else None,
        after_merging=(65, 55 - step // 4, 45 - step // 4),
    )


def history(steps: int, **options) -> SearchHistory:
    found = SearchHistory(2.0, 4.0, steps, (65, 65, 65))
    for step in range(steps):
        found = found.with_record(record(step, **options))
    return found


def told(steps: int, *, first: int = 0, terminal: bool = False, width: int = 160, name="2 GFLOPs", **options) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, highlight=False)
    with progress_report(console, name, steps, "2 GFLOPs", **options) as report:
        for step in range(first, steps):
            report(record(step))
    return output.getvalue()


def test_a_line_now_and_then():
    lines = told(1000).splitlines()
    assert lines.pop(0) == "2 GFLOPs: the loss should fall and the accuracy rise, at a cost of 2 GFLOPs"
    assert len(lines) == LINES + 1
    assert lines[0] == "2 GFLOPs  step 1/1000  loss 2.000  accuracy 25.0%  now 3 GFLOPs"
    assert lines[-1].startswith("2 GFLOPs  step 1000/1000  ")
    assert len(told(3).splitlines()) == 1 + 3


def test_a_resumed_search_tells_from_where_it_was():
    assert told(40, first=38).splitlines()[-1].startswith("2 GFLOPs  step 40/40")


def test_losses_are_smoothed():
    last = float(told(100).splitlines()[-1].split("loss ")[1].split()[0])
    assert record(99).loss < last < record(80).loss


def test_without_labels_there_is_no_accuracy():
    assert "agreement 25.0%" in told(1, measure="agreement")
    assert "accuracy" not in told(1, measure="agreement")
    assert "cosine 0.2500" in told(1, measure="cosine")
    assert "the cosine should rise" in told(1, measure="cosine")
    assert "loss" not in told(1, measure="cosine")


def test_a_bar_on_a_terminal():
    shown = told(10, terminal=True)
    for words in ("10/10", "loss", "accuracy", "now 3 GFLOPs", "ETA", "━"):
        assert words in shown


@pytest.mark.parametrize(
    ("width", "measure", "shown", "left_out"),
    [
        (60, "accuracy", ["loss"], ["accuracy", "now"]),
        (80, "accuracy", ["loss", "accuracy 25.0%"], ["now"]),
        (120, "accuracy", ["loss", "accuracy 25.0%", "now 3 GFLOPs"], []),
        (60, "cosine", ["cosine 0.2500"], ["now"]),
    ],
)
def test_a_narrow_terminal_still_shows_what_counts(width, measure, shown, left_out):
    """The longest names and numbers that are usual; the last state of the bar is on the last line."""
    text = told(1000, terminal=True, width=width, name="0.2106 GFLOPs", measure=measure)
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).replace("\r", "\n").strip().splitlines()[-1].strip()
    assert len(last) <= width
    assert "…" not in last
    assert last.startswith("0.2106 GFLOPs ━")
    assert "1000/1000" in last
    assert re.search(r"ETA \d:\d\d:\d\d$", last)
    assert all(words in last for words in shown)
    assert not any(words in last for words in left_out)


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard_report(tmp_path) as report:
        for step in range(3):
            report(record(step))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/classification", "loss/flops", "accuracy", "gflops", "learning_rate"} < tags
    for kind in ("pruning", "merging"):
        assert {f"kept after {kind}/block {i}" for i in (1, 2, 3)} < tags
    losses = events.Scalars("loss/classification")
    assert [(event.step, pytest.approx(event.value)) for event in losses] == [(i, record(i).loss) for i in range(3)]


def test_tensorboard_without_steps_writes_nothing(tmp_path):
    with tensorboard_report(tmp_path / "log"):
        pass
    assert not (tmp_path / "log").exists()


def test_several_reports():
    first: list[StepRecord] = []
    second: list[StepRecord] = []
    all_reports([first.append, second.append])(record(0))
    assert first == second == [record(0)]


def drawn(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def panel(figure, title: str):
    return next(axis for axis in figure.axes if axis.get_title() == title)


@pytest.mark.parametrize("prune", [True, False])
def test_picture(prune):
    found = history(30, prune=prune)
    schedule = Schedule([65, 53, 43] if prune else None, [65, 48, 38])
    figure = draw_search(found, schedule, 2.01)
    assert figure.get_suptitle() == "Search for a schedule of 2 GFLOPs (50% of the uncompressed 4)"
    assert len(np.unique(drawn(figure).reshape(-1, 3), axis=0)) > 100
    assert panel(figure, "tokens after each block").lines[2].get_ydata()[-1] == 38

    pruned, merged = (panel(figure, f"tokens {how} by each block") for how in ("pruned", "merged"))
    last_pruned, last_merged = (axis.images[0].get_array()[:, -1].tolist() for axis in (pruned, merged))
    # 65 tokens enter the second block; at step 29 it keeps 53 after pruning and 48 after merging, the third 43 and 38
    assert last_pruned == ([0, 12, 5] if prune else [0, 0, 0])
    assert last_merged == ([0, 5, 5] if prune else [0, 17, 10])
    assert [text.get_text() for text in pruned.texts] == ([] if prune else ["no tokens are pruned"])
    assert not merged.texts
    legend = panel(figure, "the schedule found").get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["kept", "merged", *["pruned"] * prune]


def test_no_tokens_are_white_in_the_heat_maps_and_few_are_not():
    figure = draw_search(history(30), Schedule([65, 53, 43], [65, 48, 38]), 2.0)
    image = panel(figure, "tokens pruned by each block").images[0]
    none, one, most = image.to_rgba(np.array([[0.0, 1.0, image.get_clim()[1]]]), bytes=True)[0]
    assert none.tolist() == [255] * 4
    assert one[:3].min() < 250 > most[:3].max() + 100
    (bar,) = (axis for axis in figure.axes if "white: none" in axis.get_ylabel())
    assert "tokens" in bar.get_ylabel()


def test_the_target_is_met_in_the_picture():
    found = history(30)
    found = replace(found, records=tuple(replace(one, cost=2.0 + 0.001 * (one.step % 2)) for one in found.records))
    axis = panel(draw_search(found, Schedule([65, 53, 43], [65, 48, 38]), 2.002), "GFLOPs beside the target")
    low, high = axis.get_ylim()
    assert low < 1.9 < 2.1 < high  # a thousandth off the target looks like one
    labels = {line.get_label(): line for line in axis.lines}
    assert list(labels["target: 2"].get_ydata()) == [2.0, 2.0]
    assert list(labels["schedule found: 2.002"].get_ydata()) == [2.002]
    far = panel(draw_search(history(30), Schedule([65, 53, 43], [65, 48, 38]), 2.0), "GFLOPs beside the target")
    assert far.get_ylim()[1] > 3  # where the search was


def test_the_loss_fills_its_axis():
    axis = panel(
        draw_search(history(30), Schedule([65], [65]), 3.0), "on the batches: loss and accuracy (bold: running mean)"
    )
    low, high = axis.get_ylim()
    assert 1.6 < low < 1.71
    assert 2 < high < 2.1


def test_pictures_differ_with_the_history():
    schedule = Schedule([65, 53, 43], [65, 48, 38])
    other = history(30)
    other = replace(other, records=(*other.records[:-1], replace(other.records[-1], cost=1.0)))
    assert not np.array_equal(drawn(draw_search(history(30), schedule, 2.0)), drawn(draw_search(other, schedule, 2.0)))


def test_a_picture_of_one_step():
    assert drawn(draw_search(history(1), Schedule([65, 60, 50], [65, 55, 45]), 3.0)).any()


def test_a_family_with_stages():
    """Where the grid changes, the tokens before the first block of a stage are the stage's, not those left before."""
    only = replace(record(0, prune=False), after_merging=(64, 40, 16, 16))
    found = SearchHistory(2.0, 4.0, 1, (64, 64, 16, 16), (only,))
    figure = draw_search(found, Schedule(None, [64, 40, 16, 16], prefix=0), 3.0)
    merged = panel(figure, "tokens merged by each block")
    assert merged.images[0].get_array()[:, 0].tolist() == [0, 24, 0, 0]


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no records"):
        draw_search(history(0), Schedule([65], [65]), 1.0)


@pytest.mark.parametrize(
    ("measure", "title", "labels"),
    [
        ("accuracy", "loss and accuracy", ["loss (cross entropy)", "accuracy"]),
        ("agreement", "loss and agreement", ["loss (cross entropy)", "agreement (same class as uncompressed)"]),
        ("cosine", "loss", ["1 - cosine to the uncompressed features"]),
    ],
)
def test_the_picture_says_what_was_measured(measure, title, labels):
    figure = draw_search(replace(history(9), measure=measure), Schedule([65], [65]), 3.0)
    assert panel(figure, f"on the batches: {title} (bold: running mean)").get_ylabel() == labels[0]
    shown = [axis.get_ylabel() for axis in figure.axes]
    assert [label for label in shown if "accuracy" in label or "agreement" in label] == labels[1:]
