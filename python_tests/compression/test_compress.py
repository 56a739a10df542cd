"""What compress and restore promise whatever the family: copies, files, torch.compile, export."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffrate_ext.compression.compress import compress, restore, token_slots
from diffrate_ext.schedule import Schedule

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def vit(**changes: Any) -> tuple[nn.Module, Schedule, Tensor]:
    return (
        VisionTransformer(**TINY, **changes).eval(),
        Schedule([17, 14, 9, 9], [17, 12, 9, 6]),
        torch.randn(3, 3, 16, 16),
    )


def caformer() -> tuple[nn.Module, Schedule, Tensor]:
    model = MetaFormer(
        num_classes=7,
        depths=[1, 1, 3, 1],
        dims=[8, 16, 32, 64],
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    ).eval()
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model, Schedule(None, [16, 11, 7, 4], prefix=0), torch.randn(3, 3, 64, 64)


CASES = {
    "class token": vit,
    "mean pool": lambda: vit(global_pool="avg"),
    "attention pool": lambda: vit(global_pool="map"),
    "CAFormer": caformer,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Schedule, Tensor]:
    torch.manual_seed(0)
    return CASES[request.param]()


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_copies_of_a_compressed_model(case: tuple[nn.Module, Schedule, Tensor], copied: Any) -> None:
    model, schedule, images = case
    plain = model(images)
    logits = compress(model, schedule)(images)
    other = copied(model)
    assert torch.equal(other(images), logits)
    assert type(other) is type(model)
    assert torch.equal(restore(other)(images), plain)
    assert torch.equal(model(images), logits)  # restoring the copy left the original alone


def test_weights_go_both_ways(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    other = copy.deepcopy(model)
    nn.init.ones_(next(other.parameters()))
    compress(model, schedule)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert torch.equal(compress(other, schedule)(images), model(images))


def test_compressing_again_replaces_the_schedule(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    plain, once = model(images), compress(copy.deepcopy(model), schedule)(images)
    first = schedule.after_merging[0]
    fewer = [first, *[n - 1 for n in schedule.after_merging[1:]]]
    compress(model, Schedule(schedule.after_pruning, fewer, prefix=schedule.prefix))
    assert not torch.equal(model(images), once)
    assert torch.equal(compress(model, schedule)(images), once)
    assert torch.equal(restore(model)(images), plain)


def test_a_schedule_that_does_not_fit_leaves_the_model_as_it_was(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    logits = compress(model, schedule)(images)
    with pytest.raises(ValueError, match="blocks, the model"):
        compress(model, Schedule(None, [*schedule.after_merging, 2], prefix=schedule.prefix))
    assert torch.equal(model(images), logits)


def test_one_graph_for_all_batch_sizes(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    compress(model, schedule)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (images, images[:2], torch.cat([images, images])):
            torch._dynamo.mark_dynamic(batch, 0)
            torch.testing.assert_close(compiled(batch), model(batch))
    assert counter.frame_count == 1


def test_export_with_a_free_batch_size(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    compress(model, schedule)
    shapes = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images,), dynamic_shapes=(shapes,))
    for batch in (images, images[:2]):
        torch.testing.assert_close(program.module()(batch), model(batch))


def test_a_compressed_model_holds_nothing_of_its_last_images(case: tuple[nn.Module, Schedule, Tensor]) -> None:
    model, schedule, images = case
    compress(model, schedule)

    def state() -> list[set[str]]:
        return [set(vars(module)) for module in model.modules()]

    before = state()
    model(images)
    token_slots(model, images)
    assert state() == before


def test_what_is_not_compressed_cannot_be_restored_or_followed() -> None:
    model, _, images = vit()
    with pytest.raises(ValueError, match="the model is not compressed"):
        restore(model)
    with pytest.raises(ValueError, match="the model is not compressed"):
        token_slots(model, images)


def test_what_is_no_schedule_is_refused() -> None:
    model, _, _ = vit()
    with pytest.raises(TypeError, match="schedule must be a Schedule, got list"):
        compress(model, [17, 14, 9, 6])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got str: read a file with Schedule.load\(path\)"):
        compress(model, "schedule.json")  # type: ignore[call-overload, unused-ignore, arg-type]


def test_a_schedule_of_another_model_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, schedule, _ = vit()
    model.pretrained_cfg = {"architecture": "vit_of_this_test", "tag": "a"}
    compress(model, replace(schedule, model="vit_of_this_test.a"))
    assert not caplog.records
    compress(model, replace(schedule, model="another.b"))
    (record,) = caplog.records
    assert "made for another.b, and the model is vit_of_this_test.a" in record.getMessage()


def test_unknown_and_wrapped_models_are_refused() -> None:
    model, schedule, _ = vit()
    with pytest.raises(
        TypeError,
        match=r"Linear is not supported: expected one of timm's .*Eva, MetaFormer, or of transformers' ViTModel, ",
    ):
        compress(nn.Linear(2, 2), schedule)
    with pytest.raises(TypeError, match="compress the model first"):
        compress(torch.compile(model), schedule)
