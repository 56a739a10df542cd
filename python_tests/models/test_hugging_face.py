"""Vision transformers of Hugging Face's transformers, compressed in place: as timm's with the same weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from tiny_models import spread_weights, tiny_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate_ext import (
    InputTypeError,
    InputValueError,
    RateSearch,
    Schedule,
    benchmark,
    compare,
    compress,
    compressed_copy,
    finetune,
    flops,
    restore,
    search,
    to_standard_operators,
    token_slots,
    train_predictors,
    uniform_schedule,
    visualize,
)
from diffrate_ext.models import adapter_for

transformers = pytest.importorskip("transformers", minversion="5")

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def made(model: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: spread_weights(getattr(transformers, model)(getattr(transformers, config)(**TINY, **options)))


MODELS: dict[str, Callable[[], Any]] = {
    "ViT": made("ViTModel", "ViTConfig"),
    "ViT with classes": made("ViTForImageClassification", "ViTConfig", num_labels=5),
    "DINOv2": made("Dinov2Model", "Dinov2Config"),
    "DINOv2, SwiGLU": made("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
    "DINOv2 with registers": made("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=2),
    "DINOv3": made("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=3, pos_embed_rescale=None),
    "CLIP": made("CLIPVisionModel", "CLIPVisionConfig"),
    "CLIP with projection": made("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=5),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def schedule_for(model: nn.Module) -> Schedule:
    p = adapter_for(model).rules.prefix
    return Schedule([p + n for n in (16, 14, 8, 8)], [p + n for n in (16, 10, 8, 5)], prefix=p)


def result_of(output: Any) -> Tensor:
    """Logits, or what is nearest to them."""
    found = next(output[name] for name in ("logits", "image_embeds", "pooler_output") if output.get(name) is not None)
    assert isinstance(found, Tensor)
    return found


def test_a_schedule_that_removes_nothing_changes_no_bit(model: Any) -> None:
    tokens, prefix = 16 + adapter_for(model).rules.prefix, adapter_for(model).rules.prefix
    before = model(images(), output_hidden_states=True)
    compress(model, Schedule(None, [tokens] * 4, prefix=prefix), linear_patch_embedding=False)
    after = model(images(), output_hidden_states=True)
    assert torch.equal(result_of(after), result_of(before))
    for one, other in zip(after.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(one, other)


def test_a_compressed_run_and_back(model: Any) -> None:
    before, keys, classes = result_of(model(images())), list(model.state_dict()), [type(m) for m in model.modules()]
    assert compress(model, schedule_for(model)) is model
    compressed = result_of(model(images()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(result_of(twin(images())), compressed)
    after = model(images(), output_hidden_states=True)
    p = adapter_for(model).rules.prefix
    assert [hidden.shape[1] - p for hidden in after.hidden_states] == [16, 16, 10, 8, 5]
    assert not torch.allclose(result_of(after), before, atol=1e-3)
    slots = token_slots(model, images())
    assert [int(slot.max()) + 1 - p for slot in slots] == [16, 10, 8, 5]
    assert list(model.state_dict()) == keys
    restore(model)
    assert torch.equal(result_of(model(images())), before)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("method", ["diffrate", "tome", "evit"])
@pytest.mark.parametrize("kind", ["ViT with classes", "DINOv3"])
def test_it_computes_what_timms_model_does(kind: str, method: str) -> None:
    model = MODELS[kind]()
    twin = timms_vit(model) if kind == "ViT with classes" else timms_dinov3(model)
    p = adapter_for(model).rules.prefix
    torch.testing.assert_close(twin(images()), result_of(model(images())), atol=1e-5, rtol=1e-4)
    schedule = (
        schedule_for(model) if method == "diffrate" else Schedule(None, [p + n for n in (16, 12, 8, 6)], prefix=p)
    )
    with torch.no_grad():
        expected = compress(twin, schedule, method=method)(images())
        found = result_of(compress(model, schedule, method=method)(images()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert flops(model, schedule) == flops(twin, schedule)


def test_flops_are_those_torch_counts(model: Any) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images()[:1])
    adapter = adapter_for(model)
    extra = adapter.rules.prefix * adapter.patch_convolutions[0].weight.numel()  # the paper counts these
    attention = 4 * 2 * (16 + adapter.rules.prefix) ** 2 * 16  # which torch may not count
    assert flops(model) in (counter.get_total_flops() // 2 + extra, counter.get_total_flops() // 2 + extra + attention)


def test_gradients_are_the_same_with_checkpointing(model: Any) -> None:
    compress(model, schedule_for(model)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        result_of(model(images())).square().sum().backward()
        gradients.append({name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("patch_embedding" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ViT with classes", "DINOv3"])
def test_the_search_step_is_timms(kind: str) -> None:
    model = MODELS[kind]()
    twin = timms_vit(model) if kind == "ViT with classes" else timms_dinov3(model)
    found = []
    for one in (model, twin):
        rates = some_rates(one)
        output = rates.train()(images())
        logits = output if isinstance(output, Tensor) else result_of(output)
        logits.square().sum().backward()
        found.append((logits, rates.prune_logits.grad, rates.merge_logits.grad))
    for ours, timms in zip(*found, strict=True):
        torch.testing.assert_close(ours, timms, atol=1e-4, rtol=1e-3)
        assert timms.abs().sum() > 0


def test_every_model_has_the_search_step(model: Any) -> None:
    rates = some_rates(model).train()
    output = rates(images())
    if "last_hidden_state" in output:  # nothing is dropped
        assert output.last_hidden_state.shape[1] == 16 + adapter_for(model).rules.prefix
    result_of(output).square().sum().backward()
    assert rates.prune_logits.grad.abs().sum() > 0
    assert rates.merge_logits.grad.abs().sum() > 0


def some_rates(model: nn.Module) -> RateSearch:
    """A search, not at its beginning."""
    rates = RateSearch(model)
    candidates = torch.arange(rates.n_patches, 0, -1)
    with torch.no_grad():
        for logits, most in ((rates.prune_logits, 13.3), (rates.merge_logits, 11.2)):
            for row in range(len(logits)):
                logits[row] = -(candidates - (most - 4 * row)).abs()
    return rates


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_that_a_model_was_loaded_with_is_no_matter(implementation: str) -> None:
    model = MODELS["ViT"]()
    compress(model, schedule_for(model))
    expected = result_of(model(images()))
    model.set_attn_implementation(implementation)
    assert torch.equal(result_of(model(images())), expected)


def test_benchmark() -> None:
    measured = benchmark(MODELS["ViT"](), schedule_for(MODELS["ViT"]()), batch_size=2, rounds=1)
    assert measured.speed_up > 0


def test_it_compiles() -> None:
    model = MODELS["DINOv3"]()
    expected = result_of(compress(model, schedule_for(model))(images()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(result_of(compiled(images())), expected)


@pytest.mark.parametrize(("kind", "options"), [("ViT", {"interpolate_pos_encoding": True}), ("DINOv3", {})])
def test_images_of_another_size_keep_the_rates(kind: str, options: dict[str, Any]) -> None:
    model = MODELS[kind]()
    schedule, prefix = schedule_for(model), adapter_for(model).rules.prefix
    compress(model, schedule)
    left = model(torch.randn(2, 3, 32, 16), **options).last_hidden_state.shape[1] - prefix
    assert left == 2 * (schedule.after_merging[-1] - prefix)


def test_a_tower_inside_a_model() -> None:
    """LLaVA takes the last layer but one and leaves out the class token."""
    tower = MODELS["CLIP"]()
    schedule = uniform_schedule(tower, "70%")
    compress(tower, schedule)
    features = tower(images(), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert features.shape[1] == schedule.after_merging[-2] - 1
    assert compressed_copy(tower, schedule)(images()).last_hidden_state.shape[1] == schedule.after_merging[-1]


def test_what_is_not_supported_is_refused() -> None:
    model = compress(MODELS["ViT"](), schedule_for(MODELS["ViT"]()))
    with pytest.raises(InputValueError, match="output_attentions=True: a compressed model never builds"):
        model(images(), output_attentions=True)
    for kind in ("ViT", "DINOv2", "DINOv2 with registers"):
        masked = compress(MODELS[kind](), schedule_for(MODELS[kind]()))
        for given in ((images(),), (images(), None)):
            with pytest.raises(InputValueError, match="takes no attention_mask"):
                masked(*given, attention_mask=torch.ones(3, 17))
    with pytest.raises(InputValueError, match="takes no attention_mask"):
        masked(images(), None, torch.ones(3, 17))
    with pytest.raises(InputTypeError, match="call the model"):
        model.layers[0](torch.zeros(1, 17, 16))
    with pytest.raises(
        InputTypeError, match=r"SiglipVisionModel is not supported: expected .* Dinov2Model, .* CLIPVisionModel"
    ):
        uniform_schedule(made("SiglipVisionModel", "SiglipVisionConfig")(), "60%")
    broken = MODELS["ViT"]()
    broken.layers[2].attention = nn.Identity()
    with pytest.raises(InputValueError, match=r"layer 2, a ViTLayer, has other parts than in transformers 5.*q_proj"):
        flops(broken)
    batches = [(images(), torch.zeros(3, dtype=torch.int64))]
    for call, called in {
        "search": lambda: search(MODELS["ViT with classes"](), batches, "70%"),
        "finetune": lambda: finetune(MODELS["ViT with classes"](), schedule_for(model), batches),
        "compare": lambda: compare(MODELS["ViT with classes"](), batches, ["70%"]),
        "train_predictors": lambda: train_predictors(MODELS["ViT with classes"](), batches, "70%"),
        "visualize": lambda: visualize(MODELS["ViT"](), images(), schedule_for(model)),
    }.items():
        with pytest.raises(
            InputTypeError, match=f"{call} takes models that return logits .* use compress, or RateSearch"
        ):
            called()
    dropout = made("ViTModel", "ViTConfig", attention_probs_dropout_prob=0.1)()
    with pytest.raises(InputValueError, match=r"attention dropout \(0\.1\) cannot be trained"):
        compress(dropout, schedule_for(dropout)).train()(images())


def timms_vit(model: Any) -> nn.Module:
    """timm's model with the weights of a ViTForImageClassification."""
    twin = tiny_vit()
    for block in twin.blocks:
        block.norm1.eps = block.norm2.eps = 1e-12
    twin.norm.eps = 1e-12
    base = model.vit
    weights = {
        "cls_token": base.embeddings.cls_token,
        "pos_embed": base.embeddings.position_embeddings,
        **parameters("patch_embed.proj", base.embeddings.patch_embeddings.projection),
        **parameters("norm", base.layernorm),
        **parameters("head", model.classifier),
    }
    for index, layer in enumerate(base.layers):
        weights |= block_weights(f"blocks.{index}", layer, layer.layernorm_before, layer.layernorm_after)
        weights |= parameters(f"blocks.{index}.mlp.fc1", layer.mlp.fc1)
        weights |= parameters(f"blocks.{index}.mlp.fc2", layer.mlp.fc2)
    twin.load_state_dict(weights)
    return twin


def timms_dinov3(model: Any) -> nn.Module:
    """timm's model with the weights of a DINOv3ViTModel; its class token is the result."""
    twin = tiny_vit(
        Eva,
        num_classes=0,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        num_reg_tokens=3,
        init_values=1.0,
        global_pool="token",
        qkv_fused=False,
    )
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    weights = {
        "cls_token": model.embeddings.cls_token,
        "reg_token": model.embeddings.register_tokens,
        **parameters("patch_embed.proj", model.embeddings.patch_embeddings),
        **parameters("norm", model.norm),
    }
    for index, layer in enumerate(model.model.layer):
        name = f"blocks.{index}"
        weights |= {f"{name}.gamma_1": layer.layer_scale1.lambda1, f"{name}.gamma_2": layer.layer_scale2.lambda1}
        for one in ("q_proj", "k_proj", "v_proj"):
            weights |= parameters(f"{name}.attn.{one}", getattr(layer.attention, one))
        weights |= parameters(f"{name}.attn.proj", layer.attention.o_proj)
        weights |= parameters(f"{name}.norm1", layer.norm1) | parameters(f"{name}.norm2", layer.norm2)
        weights |= parameters(f"{name}.mlp.fc1", layer.mlp.up_proj) | parameters(f"{name}.mlp.fc2", layer.mlp.down_proj)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("rope" in name for name in missing)
    return twin


def block_weights(name: str, layer: Any, norm1: nn.Module, norm2: nn.Module) -> dict[str, Tensor]:
    attention = layer.attention
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {
        f"{name}.attn.qkv.weight": torch.cat([one.weight for one in three]),
        f"{name}.attn.qkv.bias": torch.cat([one.bias for one in three]),
        **parameters(f"{name}.attn.proj", attention.o_proj),
        **parameters(f"{name}.norm1", norm1),
        **parameters(f"{name}.norm2", norm2),
    }


def parameters(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{own}": weights.detach() for own, weights in module.named_parameters()}


@pytest.mark.parametrize("kind", ["ViT", "ViT with classes", "DINOv2", "DINOv2 with registers", "DINOv3", "CLIP"])
def test_through_standard_operators_to_onnx(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = MODELS[kind]()
    compress(model, schedule_for(model))
    free = torch.export.ShapesCollection()
    free[given := images()] = {0: torch.export.Dim("batch", min=1)}
    with torch.no_grad():
        program = to_standard_operators(torch.export.export(model, (given,), dynamic_shapes=free))
    assert "diffrate" not in str(program.graph)
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for some in (given, given[:1] - 1, torch.cat((given, -given))):
        with torch.no_grad():
            expected, again = model(some).to_tuple(), program.module()(some).to_tuple()
        found = [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: some.numpy()})]
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found, list(expected), atol=1e-4, rtol=1e-4)
