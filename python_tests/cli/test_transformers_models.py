"""``--model transformers:NAME``, here folders that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import search
from safetensors.torch import load_file
from tiny_hugging_face import MODELS, TINY, images

from diffrate_ext import FinetuneSettings
from diffrate_ext.cli.main import main
from diffrate_ext.images.data_config import data_config
from diffrate_ext.model_loading import load_model
from diffrate_ext.models import adapter_for
from diffrate_ext.schedule import Schedule

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.fixture
def saved(tmp_path):
    """Folders of tiny models with their image processors."""

    def save(kind: str, **processor: object) -> str:
        path = tmp_path / kind
        MODELS[kind]().save_pretrained(path)
        if processor:
            (path / "preprocessor_config.json").write_text(json.dumps(processor))
        return f"transformers:{path}"

    return save


@pytest.fixture
def two_classes(labelled, saved):
    """A model whose classes are those of the pictures."""
    config = transformers.ViTConfig(**TINY, num_labels=2, id2label={0: "tench", 1: "goldfish"})
    path = labelled.parent / "two"
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    return f"transformers:{path}"


def test_the_weights_and_the_image_processor_of_a_folder(saved):
    name = saved("CLIP", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3, do_center_crop=True,
                 size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})  # fmt: skip
    model = load_model(name)
    assert not model.training
    weights = load_file(Path(name.removeprefix("transformers:")) / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for key, values in model.state_dict().items():
        assert torch.equal(values, weights[key])
    config = data_config(model)
    assert config["input_size"] == (3, 16, 16)
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == ("bicubic", 0.8, "center")
    with pytest.warns(UserWarning, match="comes without an image processor: pictures are read with mean 0"):
        plain = data_config(load_model(saved("SigLIP")))
    assert (plain["mean"], plain["crop_pct"], plain["crop_mode"]) == ((0.5, 0.5, 0.5), 1.0, "squash")


@pytest.mark.parametrize(
    ("kind", "classes", "expected"),
    [
        ("ViT", None, "ViTModel"),
        ("ViT with classes", None, "ViTForImageClassification"),
        ("ViT", 7, "ViTForImageClassification"),
        ("DINOv2 with registers", None, "Dinov2WithRegistersModel"),
        ("DINOv3", None, "DINOv3ViTModel"),
        ("SigLIP with classes", 3, "SiglipForImageClassification"),
    ],
)
def test_the_class_of_a_model(saved, kind, classes, expected):
    model = load_model(saved(kind), num_classes=classes)
    assert type(model).__name__ == expected
    if classes is not None:
        assert model.classifier.out_features == classes


def test_the_image_tower_of_a_model_of_images_and_text(tmp_path):
    config = transformers.CLIPConfig(vision_config={**TINY, "projection_dim": 5}, text_config=TINY, projection_dim=5)
    whole = transformers.CLIPModel(config)
    whole.save_pretrained(tmp_path / "clip")
    model = load_model(f"transformers:{tmp_path / 'clip'}")
    assert type(model).__name__ == "CLIPVisionModelWithProjection"
    assert torch.equal(model.visual_projection.weight, whole.visual_projection.weight)


@pytest.mark.filterwarnings("ignore:.*without an image processor")
@pytest.mark.parametrize("kind", ["ViT with classes", "DINOv2", "DINOv3", "CLIP with projection"])
def test_weights_of_a_file_that_save_pretrained_wrote(saved, kind, tmp_path):
    name = saved(kind)
    expected = load_model(name)
    assert type(expected).__name__ == type(MODELS[kind]()).__name__
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    for path in (Path(name.removeprefix("transformers:")) / "model.safetensors", tmp_path / "weights.pth"):
        found = load_model(name, weights=path)
        assert adapter_for(found).name == adapter_for(expected).name
        for one, other in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*without an image processor")
def test_a_pooler_that_was_never_trained_is_the_class_token(tmp_path):
    config = transformers.ViTConfig(**TINY)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    found = load_model(f"transformers:{tmp_path / 'vit'}")
    assert torch.equal(found(images()).pooler_output, model(images()).last_hidden_state[:, 0])
    assert found.state_dict().keys() == model.state_dict().keys()


def test_evaluate_predict_and_benchmark(two_classes, labelled, tmp_path, capsys):
    common = ["--model", two_classes, "--gflops", "70%"]
    assert main(["evaluate", *common, "--images", str(labelled), "--workers", "0", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results[0]["top1"] is not None
    assert results[1]["gflops"] == pytest.approx(0.7 * results[0]["gflops"], rel=0.05)
    picture = next(labelled.rglob("*.png"))
    assert main(["predict", *common, "--image", str(picture), "--output", str(tmp_path / "p.png")]) == 0
    assert "tench" in capsys.readouterr().out
    assert main(["benchmark", *common, "--rounds", "1", "--batch-size", "2"]) == 0


def test_search_and_finetune(two_classes, saved, labelled, tmp_path, capsys):
    folder = tmp_path / "found"
    assert main([*search(folder, "--model", two_classes, "--images", str(labelled)), "--gflops", "70%"]) == 0
    schedule = Schedule.load(folder / "schedule.json")
    assert schedule.model == str(Path(two_classes.removeprefix("transformers:")).resolve())
    tuned = tmp_path / "tuned"
    argv = ["finetune", "--model", two_classes, "--images", str(labelled), "--steps", "2", "--batch-size", "2"]
    argv += ["--workers", "0", "--schedule", str(folder / "schedule.json"), "--output", str(tuned)]
    assert main(argv) == 0
    weights = load_model(two_classes, weights=tuned / "model.safetensors").state_dict()
    before = load_model(two_classes).state_dict()
    assert weights.keys() == before.keys()
    assert not all(torch.equal(weights[name], before[name]) for name in weights)
    assert FinetuneSettings().drop_path > 0  # which the layers of this model have no place for
    features = saved("DINOv2")
    argv = ["evaluate", "--model", features, "--images", str(labelled), "--gflops", "70%", "--workers", "0"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert (first["agreement"], second["agreement"], first["cosine"]) == (None, None, pytest.approx(1))
    assert 0 < second["cosine"] < 1
    assert main(argv) == 0
    assert "cosine: with the uncompressed features" in capsys.readouterr().out
    assert main([*search(tmp_path / "kept", "--model", features, "--images", str(labelled)), "--gflops", "70%"]) == 0
    capsys.readouterr()


def refused(argv, capsys) -> str:
    """The last line on stderr: transformers and what it imports may say things before."""
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_errors(saved, labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffrate_ext.transformers_loading.hub_answers", lambda: False)
    common = ["evaluate", "--images", str(labelled)]
    vit, dinov2, dinov3 = saved("ViT"), saved("DINOv2"), saved("DINOv3")
    swin = tmp_path / "swin"
    transformers.SwinConfig().save_pretrained(swin)
    capsys.readouterr()
    message = refused([*common, "--model", "transformers:nobody/nothing"], capsys)
    assert "transformers cannot load 'nobody/nothing', as a folder or from the hub: they are not on this" in message
    message = refused([*common, "--model", f"transformers:{swin}"], capsys)
    assert "is a 'swin' model, which is not supported: expected vit, dinov2" in message
    message = refused([*common, "--model", dinov3, "--num-classes", "5"], capsys)
    assert "'dinov3_vit' model, which has no classes" in message
    other = vit.removeprefix("transformers:")
    message = refused([*common, "--model", dinov2, "--weights", f"{other}/model.safetensors"], capsys)
    assert re.search(r"the weights of .*DINOv2, of .*ViT/model\.safetensors do not load: \d+ are missing", message)
    broken = tmp_path / "broken.pth"
    broken.write_text("hello")
    assert "broken.pth do not load into" in refused([*common, "--model", vit, "--weights", str(broken)], capsys)
    assert f"for the folder of a transformers model: {vit}" in refused([*common, "--model", other], capsys)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        load_model(vit, weights=tmp_path / "nowhere.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused([*common, "--model", vit], capsys)
    assert "needs the package transformers: pip install transformers" in message
