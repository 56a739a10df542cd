"""timm models by name: what works offline, and what the errors say."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from diffrate_ext.model_loading import load_timm_model


def test_random_weights():
    model = load_timm_model("test_vit", pretrained=False)
    assert not model.training
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights(tmp_path, suffix):
    source = timm.create_model("test_vit").eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    model = load_timm_model("test_vit", weights=path)
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(model(images), source(images))


def test_unknown_model_suggests_near_names():
    with pytest.raises(ValueError, match=r"'deit_smal_patch16_224'.*deit_small_patch16_224"):
        load_timm_model("deit_smal_patch16_224")


def test_the_start_of_a_name_suggests_the_shortest_that_begin_so():
    with pytest.raises(ValueError, match=r"names are deit_tiny_patch16_224, deit_tiny_distilled_patch16_224$"):
        load_timm_model("deit_tiny")


def test_a_misspelled_family_suggests_its_models():
    with pytest.raises(ValueError, match=r"names are deit_tiny_patch16_224, "):
        load_timm_model("deit_tinny")


def test_unknown_tag():
    with pytest.raises(ValueError, match="nope"):
        load_timm_model("test_vit.nope")


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_timm_model("test_vit", weights=tmp_path / "nowhere.pth")


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"something": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors do not load into test_vit"):
        load_timm_model("test_vit", weights=path)


def test_weights_that_are_no_weights(tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors do not load"):
        load_timm_model("test_vit", weights=path)


def test_failed_download_names_both_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no pretrained weights for vit_medium.*--weights FILE.*--no-pretrained"):
        load_timm_model("vit_medium_patch16_reg4_gap_256")


def test_models_without_published_weights():
    with pytest.raises(ValueError, match=r"--weights FILE.*--no-pretrained"):
        load_timm_model("vit_small_patch16_36x1_224")


class Hub:
    """Stands for the client's session. It notes what it was asked."""

    def __init__(self, answers: bool) -> None:
        self.answers, self.asked = answers, []

    def head(self, url, timeout):
        self.asked.append((url, timeout))
        if not self.answers:
            raise OSError("no route to host")


@pytest.mark.parametrize("answers", [False, True])
def test_a_hub_that_cannot_be_reached_is_asked_once(answers, monkeypatch):
    from huggingface_hub import constants

    hub, offline = Hub(answers), []

    def create(*_, **__):
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("no weights")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: hub)
    monkeypatch.setattr("timm.create_model", create)
    reason = "no weights" if answers else "they are not on this machine, and the Hugging Face hub cannot be reached"
    with pytest.raises(ValueError, match=f"no pretrained weights for test_vit: {reason}. Give local ones"):
        load_timm_model("test_vit")
    assert offline == [not answers]  # where it does not answer, timm finds what was downloaded before, and at once
    assert len(hub.asked) == 1
    assert hub.asked[0][1] <= 10
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="timm cannot build"):
        load_timm_model("test_vit", pretrained=False)
    assert len(hub.asked) == 1
