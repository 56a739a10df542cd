"""What an evaluation sees of its images."""

from __future__ import annotations

import warnings

import pytest
import torch
from picture_files import (
    Model,
    brightness,
    damaged_pictures,
    flat,
    warned,
)

from diffrate_ext import embedded
from diffrate_ext.images.data_config import data_config
from diffrate_ext.images.loading import evaluation_loader
from diffrate_ext.images.sources import open_images, without_labels
from diffrate_ext.training.data import training_loader


def test_image_size_of_a_model_made_for_another_one():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    assert data_config(model)["input_size"] == (3, 48, 48)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_all_images_in_order(workers):
    images, truth = embedded.load_images("test")
    source = open_images(None, split="test")
    loader = evaluation_loader(source, embedded.build_model(), batch_size=300, workers=workers)
    batches = flat(loader)
    assert len(loader) == len(batches) == 7
    torch.testing.assert_close(torch.cat([b[0] for b in batches]), embedded.normalize(images))
    assert torch.equal(torch.cat([b[1] for b in batches]), truth)
    alone = next(iter(evaluation_loader(without_labels(source), embedded.build_model(), batch_size=300)))
    assert torch.equal(alone, batches[0][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_leaves_unreadable_pictures_out(workers, tmp_path):
    with pytest.warns(UserWarning, match="cannot be read") as record:
        batches = flat(evaluation_loader(damaged_pictures(tmp_path), Model(), batch_size=2, workers=workers))
    assert brightness(batches) == [0, 30, 120, 150, 180]
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert [labels.tolist() for _, labels in batches] == [[0, 0], [0, 0], [0]]
    assert len(warned(record)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_when_no_picture_can_be_read(tmp_path, workers):
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_text("no picture")
    source = open_images(tmp_path)
    with pytest.raises(ValueError, match=r"^.*: 20 pictures in a row could not be read, the first of them .*\d\d\.png"):
        list(training_loader(source, Model(), batch_size=2, steps=1, workers=workers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of the 30 pictures could be read"):
            list(evaluation_loader(source, Model(), batch_size=8, workers=workers))
