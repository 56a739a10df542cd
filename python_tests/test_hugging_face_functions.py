"""search, finetune, compare and the others on models of transformers: as on timm's with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_hugging_face import MODELS, images, made, result_of, schedule_for, timms_dinov3, timms_siglip, timms_vit
from torch import Tensor, nn

from diffrate_ext import (
    FinetuneSettings,
    InputTypeError,
    SearchSettings,
    compare,
    compressed_copy,
    evaluate,
    finetune,
    flops,
    search,
    visualize,
)
from diffrate_ext.answers import answer_of, number_of_classes
from diffrate_ext.models import adapter_for
from diffrate_ext.predictions import class_names_of, predictions

TWINS = {"ViT with classes": timms_vit, "DINOv3": timms_dinov3, "SigLIP": timms_siglip}


def batches(labelled: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    pictures = [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(3)]
    labels = [torch.randint(5, (4,), generator=generator) for _ in range(3)]
    return list(zip(pictures, labels, strict=True)) if labelled else pictures


@pytest.fixture(params=TWINS)
def twins(request: pytest.FixtureRequest) -> tuple[Any, nn.Module, bool]:
    model = MODELS[request.param]()
    return model, TWINS[request.param](model), request.param == "ViT with classes"


def test_search(twins: tuple[Any, nn.Module, bool]) -> None:
    model, twin, classes = twins
    settings = SearchSettings(steps=4, soft_targets=not classes, granularity=2)
    found = [search(one, batches(classes), "70%", settings, validation=batches(classes)) for one in (model, twin)]
    ours, timms = (one.history.records for one in found)
    for one, other in zip(ours, timms, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-5)
    assert found[0].schedule.after_merging == found[1].schedule.after_merging
    assert found[0].evaluation.agreement == found[1].evaluation.agreement


def test_finetune(twins: tuple[Any, nn.Module, bool]) -> None:
    model, twin, classes = twins
    losses, weights = [], []
    for one in (model, twin):
        settings = FinetuneSettings(steps=3, drop_path=0.0, distill=0.5 if classes else 1.0, lr=1.0)
        result = finetune(one, schedule_for(one), batches(classes), settings, validation=batches(classes))
        losses.append([record.loss for record in result.history.records])
        weights.append(torch.cat([p.detach().flatten().sort().values[::50] for p in result.model.parameters()]).norm())
        assert result.after is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
    assert losses[0][0] != losses[0][2]


@pytest.mark.parametrize("kind", ["ViT with classes", "DINOv2", "CLIP"])
def test_drop_path_on_any_layer(kind: str) -> None:
    """On those that have none, too: it changes what training sees, and is gone afterwards."""
    model = MODELS[kind]()
    parts = [name for name, _ in model.named_modules()]
    found = []
    for rate in (0.0, 0.9):
        settings = FinetuneSettings(steps=2, drop_path=rate, distill=1.0)
        result = finetune(model, schedule_for(model), batches(False), settings)
        assert [name for name, _ in result.model.named_modules()] == parts
        found.append([record.loss for record in result.history.records])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_tokens_and_positions_do_not_decay() -> None:
    spared = adapter_for(MODELS["DINOv2 with registers"]()).undecayed
    assert spared == {
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.register_tokens",
        "embeddings.position_embeddings",
    }
    assert adapter_for(MODELS["SigLIP"]()).undecayed == {"embeddings.position_embedding.weight", "head.probe"}


def test_compare(twins: tuple[Any, nn.Module, bool]) -> None:
    model, twin, classes = twins
    target = 0.75 * flops(twin) / 1e9
    methods = ["diffrate", "tome"]  # the one that goes by chance does not remove the same tokens twice
    rows = [compare(one, batches(classes), [target], methods, rounds=1, batch_size=2) for one in (model, twin)]
    assert len(rows[0]) == 3
    for ours, timms in zip(*rows, strict=True):
        assert (ours.method, ours.evaluation.agreement) == (timms.method, timms.evaluation.agreement)
        assert ours.cosine == pytest.approx(timms.cosine, abs=1e-4)


def test_evaluate_and_predictions() -> None:
    model = MODELS["ViT with classes"]()
    compressed = compressed_copy(model, schedule_for(model))
    twin = timms_vit(model)
    ours = evaluate(compressed, batches(True), model)
    timms = evaluate(compressed_copy(twin, schedule_for(twin)), batches(True), twin)
    assert (ours.top1, ours.agreement) == (timms.top1, timms.agreement)
    assert ours.loss == pytest.approx(timms.loss, rel=1e-5)
    assert class_names_of(model) is None
    model.config.id2label = dict(enumerate(["tench, Tinca", "goldfish", "shark", "ray", "cock"]))
    said = predictions(model, compressed, images())
    assert said.of_images[0].after.split(",")[0] in {"tench", "goldfish", "shark", "ray", "cock"}
    assert predictions(MODELS["DINOv2"](), MODELS["DINOv2"](), images()).of_images[0].after == "1.000"


def test_visualize() -> None:
    model = MODELS["SigLIP"]()
    figure = visualize(model, images(), schedule_for(model))
    assert len(figure.axes) > 3 * 4


def test_the_answer_is_what_counts_most() -> None:
    for kind, (shape, classes) in {
        "ViT with classes": ((3, 5), 5),
        "ViT": ((3, 16), 0),
        "CLIP with projection": ((3, 5), 0),
        "SigLIP with classes": ((3, 5), 5),
    }.items():
        model = MODELS[kind]()
        assert answer_of(model(images())).shape == shape
        assert torch.equal(answer_of(model(images())), result_of(model(images())))
        assert number_of_classes(model) == classes
    tower = made("ViTModel", "ViTConfig")()
    tower.pooler = None
    with pytest.raises(InputTypeError, match=r"as one tensor, or as logits, image_embeds, pooler_output; got a Base"):
        answer_of(tower(images()))
    assert number_of_classes(nn.Linear(2, 2)) is None
    assert isinstance(answer_of(torch.zeros(2)), Tensor)
