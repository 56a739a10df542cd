"""Vision transformers of Hugging Face's transformers, compressed in place: as timm's with the same weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hugging_face import (
    MODELS,
    images,
    made,
    result_of,
    schedule_for,
    some_rates,
    timms_dinov3,
    timms_siglip,
    timms_vit,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate_ext import (
    InputTypeError,
    InputValueError,
    Schedule,
    benchmark,
    compress,
    flops,
    restore,
    to_standard_operators,
    token_slots,
    train_predictors,
)
from diffrate_ext.models import adapter_for

TWINS = {"ViT with classes": timms_vit, "DINOv3": timms_dinov3, "SigLIP": timms_siglip}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


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
    found = result_of(after)
    assert found.shape != before.shape or not torch.allclose(found, before, atol=1e-3)
    slots = token_slots(model, images())
    assert [int(slot.max()) + 1 - p for slot in slots] == [16, 10, 8, 5]
    assert list(model.state_dict()) == keys
    restore(model)
    assert torch.equal(result_of(model(images())), before)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, method) for kind in TWINS for method in ("diffrate", "tome", "evit")][:-1]
)
def test_it_computes_what_timms_model_does(kind: str, method: str) -> None:
    model = MODELS[kind]()
    twin = TWINS[kind](model)
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


@pytest.mark.parametrize("kind", TWINS)
def test_the_search_step_is_timms(kind: str) -> None:
    model = MODELS[kind]()
    twin = TWINS[kind](model)
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
    broken = MODELS["ViT"]()
    broken.layers[2].attention = nn.Identity()
    with pytest.raises(InputValueError, match=r"layer 2, a ViTLayer, has other parts than in transformers 5.*q_proj"):
        flops(broken)
    with pytest.raises(InputTypeError, match="predictors learn on timm's models"):
        train_predictors(MODELS["ViT with classes"](), [images()], 0.5)
    longer = MODELS["DINOv2"]()
    compress(longer, schedule_for(longer))
    longer.encoder.layer.append(copy.deepcopy(longer.encoder.layer[-1]))
    with pytest.raises(InputValueError, match="the model has 5 layers, and was compressed with 4: do it again"):
        longer(images())
    dropout = made("ViTModel", "ViTConfig", attention_probs_dropout_prob=0.1)()
    with pytest.raises(InputValueError, match=r"attention dropout \(0\.1\) cannot be trained"):
        compress(dropout, schedule_for(dropout)).train()(images())


@pytest.mark.parametrize(
    "kind",
    ["ViT", "ViT with classes", "DINOv2", "DINOv2 with registers", "DINOv3", "CLIP", "SigLIP", "DINOv2 with classes"],
)
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
