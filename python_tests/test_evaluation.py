"""evaluate: numbers against a model whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffrate_ext import InputValueError, compressed_copy
from diffrate_ext.evaluation import evaluate, evaluate_all


class PixelClassifier(nn.Module):
    """Its logits are the first three pixels, times a weight; it notes in which mode it was called."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images.flatten(1)[:, :3] * self.weight


def images_of(classes: list[int], peak: float = 2.0) -> Tensor:
    """Images (n, 1, 2, 2) that PixelClassifier puts in these classes."""
    images = torch.zeros(len(classes), 1, 2, 2)
    images.flatten(1)[range(len(classes)), classes] = peak
    return images


def test_counts_top1_and_loss_over_uneven_batches():
    images, labels = images_of([0, 1, 2, 1, 0]), torch.tensor([0, 1, 2, 2, 1])
    result = evaluate(PixelClassifier(), DataLoader(TensorDataset(images, labels), batch_size=2))
    right, wrong = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)
    assert result.n == 5
    assert result.top1 == 3 / 5
    assert result.loss == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-6)
    assert result.agreement is None
    assert result.predictions.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("as_predictions", [False, True])
def test_agreement_with_a_reference(as_predictions):
    # a negative weight turns the largest logit into the smallest: of the zeros, the first wins
    batches = [images_of([0, 1]), images_of([2])]
    reference: nn.Module | Tensor = PixelClassifier(-1.0)
    if as_predictions:
        reference = evaluate(reference, batches).predictions
    result = evaluate(PixelClassifier(), batches, reference)
    assert result.agreement == 0
    assert evaluate(PixelClassifier(3.0), batches, PixelClassifier()).agreement == 1
    assert evaluate(PixelClassifier(), batches, torch.tensor([0, 2, 2])).agreement == 2 / 3
    assert result.top1 is None
    assert result.loss is None


def test_runs_in_evaluation_mode_without_gradients_and_puts_the_mode_back():
    model, reference = PixelClassifier().train(), PixelClassifier().train()
    result = evaluate(model, [images_of([0])], reference)
    assert model.modes == [False]
    assert reference.modes == [False]
    assert model.training
    assert reference.training
    assert not result.predictions.requires_grad


def test_puts_the_mode_back_after_an_error():
    model = PixelClassifier().train()
    with pytest.raises(ValueError, match="labels"):
        evaluate(model, [(images_of([0]), torch.tensor([0, 1]))])
    assert model.training


def test_casts_images_to_the_dtype_of_the_model():
    assert evaluate(PixelClassifier().double(), [images_of([1, 2])]).predictions.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("batches", "reference", "error", "message"),
    [
        ([], None, ValueError, "no images"),
        ([(images_of([0]), torch.tensor([3]))], None, ValueError, r"0 \.\. 2"),
        ([(images_of([0]), torch.tensor([-1]))], None, ValueError, r"0 \.\. 2"),
        ([(images_of([0]), torch.tensor([0.0]))], None, TypeError, "integer dtype"),
        ([(images_of([0]), torch.tensor([0])), images_of([0])], None, ValueError, "some batches"),
        ([images_of([0]), (images_of([0]), torch.tensor([0]))], None, ValueError, "some batches"),
        ([(images_of([0]),)], None, TypeError, "batch"),
        ([{"image": images_of([0])}], None, TypeError, "dict"),
        ([images_of([0])], torch.tensor([0, 1]), ValueError, r"\(2,\), expected \(1,\)"),
    ],
)
def test_bad_input(batches, reference, error, message):
    with pytest.raises(error, match=message):
        evaluate(PixelClassifier(), batches, reference)


def test_a_model_that_gives_no_logits():
    with pytest.raises(ValueError, match="logits"):
        evaluate(nn.Identity(), [images_of([0])])


def test_modules_that_were_frozen_in_evaluation_mode_stay_so():
    """As one trains with the statistics of some batch norms fixed."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Dropout(0.5)).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert True in before
    assert False in before
    evaluate(model, [torch.randn(2, 1, 2, 2)])
    assert [module.training for module in model.modules()] == before


def test_features_are_compared_by_their_cosine() -> None:
    model = tiny_vit(num_classes=0)
    images, labels = tiny_images(model, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    compressed = compressed_copy(model, tiny_schedule(model))
    found = evaluate(compressed, batches, model)
    with torch.no_grad():
        expected = torch.nn.functional.cosine_similarity(compressed(images), model(images)).mean()
    assert found.cosine == pytest.approx(float(expected), abs=1e-6)
    assert found.cosine < 0.999
    assert (found.top1, found.loss, found.agreement) == (None, None, None)
    assert evaluate(compressed, batches).cosine is None
    first, second = evaluate_all([model, compressed], batches)
    assert (first.cosine, second.cosine) == (pytest.approx(1), pytest.approx(found.cosine))
    with pytest.raises(InputValueError, match="no classes to agree on: the reference must be a model"):
        evaluate(compressed, batches, first.predictions)
    assert evaluate(tiny_vit(), batches).cosine is None
