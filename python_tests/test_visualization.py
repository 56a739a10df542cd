"""visualize: from slots to colours, and from colours to pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from diffrate_ext import embedded
from diffrate_ext.compression.compress import compress, token_slots
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.visualization import (
    CELL,
    PRUNED,
    SINGLE,
    check_output,
    displayable,
    enlarge,
    group_colour,
    group_ids,
    n_kept,
    paint_tokens,
    visualize,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return embedded.build_model().eval()


@pytest.fixture(scope="module")
def images():
    return embedded.normalize(embedded.load_images("test")[0][:2])


def ids_of(*slots: list[int]) -> list[list[int]]:
    return group_ids(np.array(slots)).tolist()


def test_equal_slots_make_a_group_and_others_do_not():
    assert ids_of([3, 5, 3, -1, 9]) == [[1, SINGLE, 1, PRUNED, SINGLE]]


def test_several_groups_get_different_numbers():
    assert ids_of([2, 2, 1, 1, 4]) == [[2, 2, 1, 1, SINGLE]]


def test_a_group_keeps_its_number_when_slots_are_renumbered_and_when_it_grows():
    assert ids_of([1, 1, 2, 3], [7, 7, 4, 9], [2, 2, 2, 1]) == [
        [1, 1, SINGLE, SINGLE],
        [1, 1, SINGLE, SINGLE],
        [1, 1, 1, SINGLE],
    ]


def test_when_groups_merge_the_number_of_the_larger_stays():
    assert ids_of([1, 1, 2, 2, 2], [1, 1, 1, 1, 1]) == [[1, 1, 2, 2, 2], [2, 2, 2, 2, 2]]
    assert ids_of([1, 1, 2, 2], [5, 5, 5, 5]) == [[1, 1, 2, 2], [1, 1, 1, 1]]


def test_a_pruned_group_frees_nothing_for_later_groups():
    assert ids_of([1, 1, 2, 3], [-1, -1, 2, 2]) == [[1, 1, SINGLE, SINGLE], [PRUNED, PRUNED, 2, 2]]


def test_ids_of_a_real_compression_say_the_same_as_its_slots(images):
    torch.manual_seed(0)
    compressed = embedded.build_model().eval()
    compress(compressed, uniform_schedule(compressed, 0.2))
    slots = torch.stack(token_slots(compressed, images))[:, 1, 1:].numpy()
    for after, ids in zip(slots, group_ids(slots), strict=True):
        assert ((after == -1) == (ids == PRUNED)).all()
        for slot in np.unique(after[after >= 0]):
            members = after == slot
            alone = members.sum() == 1
            assert len(set(ids[members])) == 1
            assert (ids[members][0] == SINGLE) == alone
            if not alone:
                assert not (ids[~members] == ids[members][0]).any()


def test_neighbouring_group_colours_differ():
    colours = np.array([group_colour(number) for number in range(1, 40)])
    assert ((colours >= 0) & (colours <= 1)).all()
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 9 * np.eye(len(colours))
    assert distance.min() > 0.02
    assert np.diagonal(distance, 1).min() > 0.5


def test_a_merged_token_has_the_mean_colour_of_its_pixels():
    picture = np.zeros((2 * CELL, 2 * CELL, 3))
    picture[:, CELL:] = (0.2, 0.4, 0.6)
    picture[CELL:, :CELL] = 1.0
    middle, before = CELL // 2, picture.copy()
    painted = paint_tokens(picture, np.array([[1, 1], [2, SINGLE]]))
    assert np.allclose(painted[middle, [middle, CELL + middle]], (0.1, 0.2, 0.3))
    assert np.allclose(painted[middle, CELL], (0.1, 0.2, 0.3))  # no line within a token
    assert np.allclose(painted[0, middle], (0.45, 0.55, 0.65))  # a bright line around a dark one
    assert np.allclose(painted[CELL + middle, middle], 1.0)
    assert np.allclose(painted[CELL + middle, 0], 0.65)  # a dark one around a bright one
    assert (painted[CELL:, CELL:] == before[CELL:, CELL:]).all()
    assert (picture == before).all()


def test_hues_touch_single_tokens_never_and_everything_else_always():
    picture = np.full((2 * CELL, 2 * CELL, 3), 0.25)
    painted = paint_tokens(picture, np.array([[SINGLE, PRUNED], [1, 2]]), "hue")
    single, pruned = painted[:CELL, :CELL], painted[:CELL, CELL:]
    first, second = painted[CELL:, :CELL], painted[CELL:, CELL:]
    assert (single == 0.25).all()
    assert pruned.max() < 0.5
    assert len(np.unique(pruned.reshape(-1, 3), axis=0)) == 2  # black, and the hatching
    middle = CELL // 2
    for patch, number in ((first, 1), (second, 2)):
        colour = np.array(group_colour(number))
        assert np.allclose(patch[middle, middle], 0.4 * 0.25 + 0.6 * colour)
        for y, x in ((0, middle), (CELL - 1, middle), (middle, 0), (middle, CELL - 1)):
            assert np.allclose(patch[y, x], colour)
    assert (picture == 0.25).all()


def test_no_outline_inside_a_group():
    ids = np.full((3, 3), 1)
    ids[0, 0] = SINGLE
    painted = paint_tokens(np.zeros((3 * CELL, 3 * CELL, 3)), ids, "hue")
    colour = np.array(group_colour(1))
    inside, middle = 0.6 * colour, CELL + CELL // 2
    assert np.allclose(painted[2 * CELL, middle], inside)
    assert np.allclose(painted[middle, 2 * CELL - 1], inside)
    # the corner that the single patch cuts out of the group is outlined around its tip
    assert np.allclose(painted[CELL, CELL], colour)
    assert np.allclose(painted[0, middle], colour)


def test_only_single_and_pruned_patches_paint_too():
    picture = np.ones((CELL, 2 * CELL, 3))
    assert (paint_tokens(picture, np.array([[SINGLE, SINGLE]])) == 1).all()
    assert (paint_tokens(picture, np.array([[PRUNED, PRUNED]])) < 0.5).all()


def test_displayable_undoes_the_normalisation(model, images):
    raw = embedded.load_images("test")[0][:2]
    shown = displayable(model, images)
    assert shown.shape == (2, 28, 28, 3)
    assert np.allclose(shown, raw[:, 0, :, :, None].numpy() / 255, atol=1e-6)


def test_enlarge_keeps_square_pixels_of_small_pictures():
    picture = np.random.default_rng(0).random((2, 2, 3)).round(1)
    large = enlarge(picture, (1, 1))
    assert large.shape == (CELL, CELL, 3)
    half = CELL // 2
    assert np.abs(large[:half, half:] - picture[0, 1]).max() <= 0.5 / 255
    assert enlarge(np.zeros((224, 224, 3)), (14, 14)).shape == (14 * CELL, 14 * CELL, 3)


def test_the_figure_names_blocks_tokens_and_costs(model, images):
    weak, strong = uniform_schedule(model, 0.3), uniform_schedule(model, 0.2)
    figure = visualize(model, images, strong, others=[weak, strong], blocks=[2, 12], titles=["boot", "shirt"])
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
    assert len(lines) == 3
    assert lines["0.2 GFLOPs (57%), shown"] == [197, *kept]
    assert next(iter(lines.values())) == [197] * 13


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
