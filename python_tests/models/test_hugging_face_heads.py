"""Heads of transformers' models that pool over patches: each token counts for its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hugging_face import MODELS, images, result_of, schedule_for, some_rates
from torch import Tensor, nn

from diffrate_ext import InputValueError, Schedule, compress, restore, token_slots, uniform_schedule
from diffrate_ext.models import adapter_for

transformers = pytest.importorskip("transformers", minversion="5")

AVERAGING = {
    "DINOv2 with classes": "dinov2",
    "DINOv2 with registers and classes": "dinov2_with_registers",
    "CLIP with classes": "vision_model",
    "SigLIP with classes": "vision_model",
}


@pytest.mark.parametrize("kind", AVERAGING)
def test_merged_tokens_count_for_their_patches(kind: str) -> None:
    model = MODELS[kind]()
    prefix = adapter_for(model).rules.prefix
    # ToMe's sizes are whole: a token's is the number of patches in it
    compress(model, Schedule(None, [prefix + n for n in (14, 10, 8, 6)], prefix=prefix), method="tome")
    tokens = getattr(model, AVERAGING[kind])(images()).last_hidden_state
    slots = token_slots(model, images())[-1]
    size = nn.functional.one_hot(slots, tokens.shape[1]).sum(1)[:, prefix:].to(tokens.dtype)
    assert size.sum() == 3 * 16
    assert size.max() > 1
    pooled = (tokens[:, prefix:] * size[..., None]).sum(1) / 16
    if kind.startswith("DINOv2"):
        pooled = torch.cat([tokens[:, 0], pooled], dim=1)
    torch.testing.assert_close(model(images()).logits, model.classifier(pooled), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", AVERAGING)
def test_masked_tokens_count_for_nothing(kind: str) -> None:
    model = MODELS[kind]()
    rates, prefix = some_rates(model).train(), adapter_for(model).rules.prefix
    weights: list[Tensor] = []
    with torch.no_grad():
        tokens = getattr(model, AVERAGING[kind])(images(), diffrate_weights=weights).last_hidden_state
        found = rates(images()).logits
    weight = weights[0][:, prefix:]
    assert 0 < (weight == 0).sum() < weight.numel()
    patches = tokens[:, prefix:].masked_fill((weight == 0)[..., None], 1e6)
    pooled = (patches * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    if kind.startswith("DINOv2"):
        pooled = torch.cat([tokens[:, 0], pooled], dim=1)
    torch.testing.assert_close(found, model.classifier(pooled), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", [*AVERAGING, "SigLIP"])
def test_labels_and_tuples(kind: str) -> None:
    model = MODELS[kind]()
    compress(model, schedule_for(model))
    by_name = model(images(), output_hidden_states=True)
    as_tuple = model(images(), output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for one, other in zip(flat(as_tuple), flat(by_name.to_tuple()), strict=True):
        assert torch.equal(one, other)
    assert list(by_name) == list(MODELS[kind]()(images(), output_hidden_states=True))
    if kind != "SigLIP":
        labels = torch.tensor([0, 4, 2])
        expected = nn.functional.cross_entropy(by_name.logits, labels)
        torch.testing.assert_close(model(images(), labels=labels).loss, expected)


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in flat(part)]


@pytest.mark.parametrize("kind", [kind for kind in AVERAGING if not kind.startswith("SigLIP")])
def test_a_schedule_that_leaves_no_patch(kind: str) -> None:
    model = MODELS[kind]()
    prefix = adapter_for(model).rules.prefix
    pruned = [prefix + 9, prefix + 5, prefix, prefix]
    with pytest.raises(InputValueError, match=f"leaves {prefix} tokens, all of them prefix, but a .* pools over"):
        compress(model, Schedule(pruned, pruned, prefix=prefix))


@pytest.mark.parametrize("kind", ["ViT", "DINOv2 with classes", "SigLIP"])
def test_it_is_saved_as_what_it_was(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = result_of(model(images()))
    compress(model, uniform_schedule(model, "70%")).save_pretrained(tmp_path)
    again: Any = type(restore(model)).from_pretrained(tmp_path)
    assert again.config.architectures == [type(model).__name__]
    assert torch.equal(result_of(again.eval()(images())), before)
