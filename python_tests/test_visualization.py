"""visualize: the figure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import tiny_vit

from diffrate_ext import embedded
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.painting import CELL
from diffrate_ext.predictions import Prediction, Predictions
from diffrate_ext.visualization import CHANGED, check_output, displayable, n_kept, visualize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return embedded.build_model().eval()


@pytest.fixture(scope="module")
def images():
    return embedded.normalize(embedded.load_images("test")[0][:2])


def test_displayable_undoes_the_normalisation():
    model = tiny_vit()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "input_size": (3, 16, 16)}
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    shown = displayable(model, (pixels - mean) / std)
    assert np.allclose(shown, pixels.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_black_is_pruned_only_in_dark_pictures_of_one_channel(model, images):
    raw = embedded.load_images("test")[0][:2, 0, :, :, None].numpy() / 255
    assert np.allclose(displayable(model, images), 1 - 0.7 * raw, atol=1e-6)
    bright = displayable(model, embedded.normalize(255 - embedded.load_images("test")[0][:2]))
    assert np.allclose(bright, 1 - raw, atol=1e-6)


def test_the_figure_names_blocks_tokens_schedules_and_costs(model, images):
    weak, strong = uniform_schedule(model, 0.3), uniform_schedule(model, 0.2)
    learned = replace(strong, after_merging=[197, *[n - 1 for n in strong.after_merging[1:]]])
    figure = visualize(model, images, strong, others=[weak, learned, strong], blocks=[2, 12], titles=["boot", "shirt"])
    assert figure.get_suptitle() == "vit_embedded_fashion_mnist, DiffRate, uniform schedule: 0.2 of 0.351 GFLOPs (57%)"
    left, right = figure.subfigs
    assert [axes.get_title().split("\n")[0] for axes in left.axes[:3]] == ["input", "after block 2", "after block 12"]
    kept = [merged for _, merged in strong.kept_numbers(197)]
    assert [axes.get_title().split("\n")[1] for axes in left.axes[:3]] == [
        "197 tokens",
        f"{kept[1]} tokens",
        f"{kept[11]} tokens",
    ]
    assert [left.axes[0].get_ylabel(), left.axes[3].get_ylabel()] == ["boot", "shirt"]
    counts = right.axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in counts.lines}
    assert list(lines) == [
        "uncompressed, 0.351 GFLOPs",
        "uniform: 0.3 GFLOPs (85%)",
        "uniform: 0.2 GFLOPs (57%), shown",
        "uniform: 0.2 GFLOPs (57%) (2)",
        "schedule: 0.198 GFLOPs (57%)",
    ]
    assert lines["uniform: 0.2 GFLOPs (57%), shown"] == [197, *kept]
    assert next(iter(lines.values())) == [197] * 13


def test_names_of_the_model_and_the_schedules(model, images):
    schedules = [uniform_schedule(model, 0.2, method="tome"), uniform_schedule(model, 0.3)]
    figure = visualize(model, images, schedules[0], title="boots", blocks=[1])
    assert figure.get_suptitle().startswith("boots, tome, uniform schedule: ")
    figure = visualize(model, images, schedules[1], others=schedules[:1], names=["learned", "mine"], blocks=[1])
    assert ", DiffRate, learned schedule: 0.3 of " in figure.get_suptitle()
    labels = [line.get_label() for line in figure.subfigs[1].axes[0].lines]
    assert [label.partition(":")[0] for label in labels[1:]] == ["learned", "mine"]


def test_predictions_stand_beside_the_pictures(model, images, monkeypatch):
    said = Predictions(
        "heading", [Prediction("ant, 9%", "bee, 8%", changed=True), Prediction(None, "0.9", changed=False)]
    )
    monkeypatch.setattr("diffrate_ext.visualization.predictions", lambda *_: said)
    figure = visualize(model, images, uniform_schedule(model, 0.2), blocks=[12])
    first, second = (list(figure.subfigs[0].axes[index].texts) for index in (1, 3))
    assert [text.get_text() for text in first] == ["heading", "before:\nant, 9%", "after:\nbee, 8%"]
    assert [text.get_color() == CHANGED for text in first] == [False, False, True]
    assert [text.get_text() for text in second] == ["0.9"]
    assert second[0].get_color() != CHANGED


@pytest.mark.parametrize(
    ("method", "paint", "expected"),
    [
        ("diffrate", "mean", ["as in the input", "one flat colour", "the largest tokens", "pruned"]),
        ("tome", "mean", ["as in the input", "one flat colour", "the largest tokens"]),
        ("tome", "hue", ["as in the input", "merged: one hue"]),
        ("random", "mean", ["as in the input", "pruned"]),
    ],
)
def test_the_legends_show_only_what_is_there(model, images, method, paint, expected):
    figure = visualize(model, images, uniform_schedule(model, 0.2, method=method), blocks=[6], paint=paint)
    left, right = figure.subfigs
    texts = [text.get_text() for text in left.legends[0].get_texts()]
    assert len(texts) == len(expected)
    assert all(text.startswith(start) for text, start in zip(texts, expected, strict=True))
    fates = [text.get_text() for text in right.axes[1].get_legend().get_texts()]
    merged, pruned = any("token" in text and "input" not in text for text in texts), "pruned" in texts
    assert fates == ["a token of its own", *["merged with others"] * merged, *["pruned"] * pruned]


def test_the_areas_of_the_chart_fill_it(model, images):
    figure = visualize(model, images, uniform_schedule(model, 0.2), blocks=[6])
    areas = figure.subfigs[1].axes[1].collections
    assert len(areas) == 3
    top = areas[-1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(100)


def test_without_charts(model, images):
    figure = visualize(model, images, uniform_schedule(model, 0.2), blocks=[6], charts=False)
    assert len(figure.axes) == 4
    assert figure.get_suptitle()


def test_the_largest_tokens_are_highlighted(model, images):
    figure = visualize(model, images, uniform_schedule(model, 0.2), blocks=[6, 9])
    painted = [axes.images[0].get_array().reshape(-1, 3) for axes in figure.subfigs[0].axes[1:3]]
    colour = np.array([0, 0xD0, 0xFF]) / 255
    assert all((np.abs(pixels - colour).max(-1) < 1e-6).any() for pixels in painted)


def test_images_differ_before_and_after(model, images):
    figure = visualize(model, images, uniform_schedule(model, 0.2), blocks=[12])
    before, after = (axes.images[0].get_array() for axes in figure.subfigs[0].axes[:2])
    assert before.shape == after.shape == (14 * CELL, 14 * CELL, 3)
    assert (np.abs(before - after).max(-1) > 0.01).mean() > 0.5


def test_n_kept():
    assert n_kept(torch.tensor([0, 4, 4, -1, 2, -1])) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 1, 28, 28)}, "B >= 1"),
        ({"images": torch.zeros(1, 28, 28)}, r"\(B, C, H, W\)"),
        ({"blocks": [0]}, r"from 1 to 12, got \[0\]"),
        ({"blocks": [13]}, "from 1 to 12"),
        ({"blocks": []}, "from 1 to 12"),
        ({"titles": ["one"]}, "1 titles for 2 images"),
        ({"names": ["one", "two"]}, "2 names for 1 schedules"),
        ({"class_names": ["boot"]}, "1 names of classes for 10 classes"),
        ({"paint": "grey"}, "paint must be one of mean, hue, got 'grey'"),
    ],
)
def test_bad_input(model, images, arguments, message):
    arguments = {"images": images, "schedule": uniform_schedule(model, 0.2), **arguments}
    with pytest.raises(ValueError, match=message):
        visualize(model, **arguments)


def test_check_output(tmp_path):
    assert check_output(tmp_path / "new.png") == tmp_path / "new.png"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_output(tmp_path / "nowhere" / "new.png")
    with pytest.raises(ValueError, match=r"\.png"):
        check_output(tmp_path / "new.docx")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder"):
        check_output(tmp_path / "folder.png")


def test_a_model_in_training_mode_is_drawn_without_dropout(images):
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 12, "num_heads": 2}
    model = VisionTransformer(**shape, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    schedule = uniform_schedule(model, 0.6 * flops(model) / 1e9)
    first, second = (visualize(model, images, schedule, blocks=[12]) for _ in range(2))
    shown = [figure.subfigs[0].axes[1].images[0].get_array() for figure in (first, second)]
    assert np.array_equal(*shown)
    assert [module.training for module in model.modules()] == modes


def test_a_schedule_for_another_model_is_refused_unless_told_otherwise(model, images):
    mine = uniform_schedule(model, 0.2)
    other = replace(mine, model="deit_tiny_patch16_224.fb_in1k")
    with pytest.raises(ValueError, match=r"made for deit_tiny_patch16_224\.fb_in1k, and the model is vit_embedded"):
        visualize(model, images, other)
    visualize(model, images, other, any_model=True)
