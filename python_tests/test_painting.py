"""From slots to colours, and from colours to pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffrate_ext import embedded
from diffrate_ext.compression.compress import compress, token_slots
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.painting import (
    CELL,
    HIGHLIGHTS,
    PRUNED,
    SINGLE,
    enlarge,
    group_colour,
    group_ids,
    largest_groups,
    paint_tokens,
)


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


def test_ids_of_a_real_compression_say_the_same_as_its_slots():
    images = embedded.normalize(embedded.load_images("test")[0][:2])
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


def test_enlarge_keeps_square_pixels_of_small_pictures():
    picture = np.random.default_rng(0).random((2, 2, 3)).round(1)
    large = enlarge(picture, (1, 1))
    assert large.shape == (CELL, CELL, 3)
    half = CELL // 2
    assert np.abs(large[:half, half:] - picture[0, 1]).max() <= 0.5 / 255
    assert enlarge(np.zeros((224, 224, 3)), (14, 14)).shape == (14 * CELL, 14 * CELL, 3)


def test_the_largest_groups_are_those_that_ever_were():
    ids = np.array([[1, 1, 1, 2, 2, SINGLE, SINGLE, SINGLE], [PRUNED, PRUNED, PRUNED, 2, 2, 3, 3, 3]])
    assert largest_groups(ids) == [1, 3, 2]
    assert largest_groups(ids, 1) == [1]
    assert largest_groups(np.array([[SINGLE, PRUNED]])) == []


def test_the_parts_of_a_highlighted_token_have_outlines_of_one_colour():
    picture = np.full((CELL, 5 * CELL, 3), 0.5)
    ids = np.array([[7, SINGLE, 7, 8, 9]])
    plain, painted = paint_tokens(picture, ids), paint_tokens(picture, ids, highlighted=[7, 8])
    middle = CELL // 2
    colours = [np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for colour in HIGHLIGHTS]
    for patch, colour in ((0, colours[0]), (2, colours[0]), (3, colours[1])):
        assert np.allclose(painted[middle, patch * CELL], colour)
        assert np.allclose(painted[0, patch * CELL + middle], colour)
        assert np.allclose(painted[middle, patch * CELL + middle], 0.5)
    for patch in (1, 4):
        here = slice(patch * CELL, (patch + 1) * CELL)
        assert (painted[:, here] == plain[:, here]).all()
    assert (paint_tokens(picture, ids, "hue", [7]) == paint_tokens(picture, ids, "hue")).all()


@pytest.mark.parametrize("brightness", [0.0, 1.0])
def test_pruned_patches_differ_from_any_part_of_an_image(brightness):
    picture = np.full((CELL, CELL, 3), brightness)
    painted = paint_tokens(picture, np.array([[PRUNED]]))
    assert 0.03 < (painted > 0.2).all(-1).mean() < 0.3  # lines on black
