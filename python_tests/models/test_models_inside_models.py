"""Vision towers of larger models, and timm's models inside those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_hugging_face import MODELS, TINY, images, schedule_for
from tiny_models import spread_weights, tiny_caformer, tiny_images, tiny_schedule, tiny_vit
from torch import nn

from diffrate_ext import (
    InputTypeError,
    InputValueError,
    RateSearch,
    Schedule,
    compress,
    flops,
    output_tokens,
    uniform_schedule,
)
from diffrate_ext.models import adapter_for

transformers = pytest.importorskip("transformers", minversion="5")

IMAGE = 7
"""The placeholder's number."""


def tiny_llava(tower: str = "clip_vision_model", **options: Any) -> Any:
    text = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    vision = {"model_type": tower, **TINY}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **options)
    return spread_weights(transformers.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize(("strategy", "without"), [("default", 1), ("full", 0)])
@pytest.mark.parametrize("method", ["diffrate", "tome", "evit"])
def test_a_language_model_gets_the_tokens_that_were_announced(strategy: str, without: int, method: str) -> None:
    llava = tiny_llava(vision_feature_select_strategy=strategy)
    tower = llava.model.vision_tower
    compress(tower, uniform_schedule(tower, "70%", method=method), method=method)
    announced = output_tokens(tower, block=llava.config.vision_feature_layer) - without
    assert announced < 16
    words = torch.tensor([[1, *[IMAGE] * announced, 2, 3]])
    logits = llava(input_ids=words, pixel_values=images()[:1]).logits
    assert logits.shape[1] == announced + 3
    assert llava.generate(input_ids=words, pixel_values=images()[:1], max_new_tokens=2, min_new_tokens=2).shape[1] == (
        announced + 5
    )
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        llava(input_ids=torch.tensor([[1, *[IMAGE] * 16, 2]]), pixel_values=images()[:1])


def test_siglip_gives_a_language_model_all_its_tokens() -> None:
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    llava = tiny_llava("siglip_vision_model", **options)
    tower = llava.model.vision_tower
    compress(tower, uniform_schedule(tower, "70%"))
    words = torch.tensor([[1, *[IMAGE] * output_tokens(tower)]])
    assert llava(input_ids=words, pixel_values=images()[:1]).logits.shape[1] == output_tokens(tower) + 1


@pytest.mark.parametrize("kind", ["ViT", "DINOv3", "SigLIP"])
@pytest.mark.parametrize("size", [None, 16, (32, 16), (20, 28)])
def test_output_tokens_at_other_sizes(kind: str, size: Any) -> None:
    model = MODELS[kind]()
    compress(model, schedule_for(model))
    height, width = (16, 16) if size is None else (size, size) if isinstance(size, int) else size
    options = {} if kind == "DINOv3" else {"interpolate_pos_encoding": True}
    output = model(torch.randn(2, 3, height, width), output_hidden_states=True, **options)
    for block in (-1, 1, -3):
        hidden = output.hidden_states[block if block < 0 else block + 1]
        assert output_tokens(model, size, block=block) == hidden.shape[1]


@pytest.mark.parametrize("size", [16, (24, 32), (18, 30)])
def test_output_tokens_of_timms_models(size: Any) -> None:
    model = tiny_vit(dynamic_img_size=True, dynamic_img_pad=True)
    compress(model, tiny_schedule(model))
    height, width = (size, size) if isinstance(size, int) else size
    assert output_tokens(model, size) == model.forward_features(torch.randn(1, 3, height, width)).shape[1]


def test_output_tokens_refused() -> None:
    model = tiny_vit()
    with pytest.raises(InputValueError, match="not compressed"):
        output_tokens(model)
    compress(model, tiny_schedule(model))
    with pytest.raises(InputValueError, match=r"block must lie in -4 \.\. 3, got 4"):
        output_tokens(model, block=4)
    for size in (0, "16", (16, 2.5), True):
        with pytest.raises(InputTypeError, match="image_size must be in pixels"):
            output_tokens(model, size)  # type: ignore[arg-type]
    rates = RateSearch(model)
    with pytest.raises(InputValueError, match="in a search"):
        output_tokens(rates.model)
    caformer = tiny_caformer()
    compress(caformer, uniform_schedule(caformer, "80%"))
    assert output_tokens(caformer, block=3) < 16
    with pytest.raises(InputValueError, match="only images of its own size"):
        output_tokens(caformer, 128)


@pytest.mark.parametrize("classes", [0, 5])
def test_timms_model_inside_transformers_wrapper(classes: int) -> None:
    from transformers.models.timm_wrapper.modeling_timm_wrapper import (
        TimmWrapperConfig,
        TimmWrapperForImageClassification,
        TimmWrapperModel,
    )

    config = TimmWrapperConfig(architecture="test_vit", num_labels=5, do_pooling=True)
    wrapper: Any = (TimmWrapperForImageClassification if classes else TimmWrapperModel)(config)
    model = spread_weights(wrapper.timm_model)
    compress(model, uniform_schedule(model, "70%"))
    pictures = tiny_images(model, 2)
    plain, hidden = wrapper(pictures), wrapper(pictures, output_hidden_states=True)
    found = "logits" if classes else "pooler_output"
    assert torch.equal(plain[found], model(pictures))
    torch.testing.assert_close(hidden[found], model(pictures))
    expected = model.forward_intermediates(pictures, intermediates_only=True)
    for one, other in zip(hidden.hidden_states, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (tiny_llava, "model.vision_tower is one, a CLIPVisionModel: take that"),
        (lambda: nn.Sequential(nn.Identity(), tiny_vit()), "1 is one, a VisionTransformer: take that"),
    ],
)
def test_a_larger_model_names_the_part_to_compress(build: Any, named: str) -> None:
    with pytest.raises(InputTypeError, match=f"is not supported: expected .* Its {named}"):
        flops(build())


def test_a_compressed_tower_leaves_the_rest_alone() -> None:
    llava = tiny_llava()
    tower = llava.model.vision_tower
    nothing = Schedule(None, [17] * 4, prefix=adapter_for(tower).rules.prefix)
    words = torch.tensor([[1, *[IMAGE] * 16, 2]])
    before = llava(input_ids=words, pixel_values=images()[:1]).logits
    compress(tower, nothing, linear_patch_embedding=False)
    assert torch.equal(llava(input_ids=words, pixel_values=images()[:1]).logits, before)
