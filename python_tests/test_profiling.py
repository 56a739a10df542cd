"""Tables that are measured, and the plot of one. How long something takes is not asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_costs import table_of
from tiny_hugging_face import MODELS
from tiny_models import tiny_caformer, tiny_eva, tiny_images, tiny_vit

from diffrate_ext import InputValueError, compress, flops, profile_model, profiling
from diffrate_ext.models import adapter_for
from diffrate_ext.profile_plot import draw_costs

BUILDS: dict[str, Any] = {
    "ViT": tiny_vit,
    "attention pool": lambda: tiny_vit(class_token=False, global_pool="map"),
    "rotary": tiny_eva,
    "norm afterwards": lambda: tiny_eva("rotary, norm afterwards"),
    "CAFormer": tiny_caformer,
    "DINOv3 of transformers": MODELS["DINOv3"],
    "SigLIP of transformers": MODELS["SigLIP"],
}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("method", ["diffrate", "tome"])
def test_a_table_of_every_family(kind: str, method: str) -> None:
    model = BUILDS[kind]()
    if method == "tome" and kind == "CAFormer":
        method = "diffrate:operations=merge"
    classes, images = [type(module) for module in model.modules()], tiny_images(model, 2)
    before, progress = model(images), []
    table = profile_model(
        model, batch_size=2, method=method, rounds=2, on_progress=lambda done, of: progress.append((done, of))
    )
    assert [type(module) for module in model.modules()] == classes
    after = model(images)
    assert before.keys() == after.keys() if hasattr(before, "keys") else torch.equal(before, after)
    adapter = adapter_for(model)
    assert (table.model, table.method, table.batch_size, table.dtype) == (adapter.name, method, 2, "float32")
    assert table.gflops == flops(model) / 1e9
    assert progress[-1][0] == progress[-1][1] == len(progress)
    for stage, found in zip(adapter.stages, table.stages, strict=True):
        assert (found.blocks, found.entering) == (len(stage.blocks), stage.tokens)
        assert found.tokens[-1] == stage.tokens
        assert list(found.tokens) == sorted(set(found.tokens))
        assert min(found.attention) > 0
        assert min(found.mlp) > 0
        assert min(found.reduction) >= 0
        assert len(found.tokens) == len(found.attention) == len(found.mlp) == len(found.reduction)
    assert any(max(found.reduction) > 0 for found in table.stages)
    assert table.uncompressed > 0
    assert table.fixed > 0


def test_every_piece_is_timed_at_its_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts the tokens that pass, whatever the machine is doing."""
    model, passed = tiny_vit(), [0.0]

    class Counter(profiling._Clock):
        def mark(self) -> float:
            return passed[0]

        def between(self, pairs: Any) -> list[float]:
            return [end - begin for begin, end in pairs]

    for block in model.blocks:
        for module, weight in ((block.attn.qkv, 1.0), (block.mlp.fc1, 1000.0)):
            module.register_forward_hook(
                lambda _, inputs, __, weight=weight: passed.__setitem__(0, passed[0] + weight * inputs[0].shape[1])
            )
    monkeypatch.setattr(profiling, "_Clock", Counter)
    (stage,) = profile_model(model, batch_size=1, rounds=2).stages
    assert stage.attention == pytest.approx([1e3 * tokens for tokens in stage.tokens])
    assert stage.mlp == pytest.approx([1e6 * tokens for tokens in stage.tokens])


def test_what_a_whole_model_takes_beyond_its_pieces_is_put_down_to_removing_tokens() -> None:
    table = table_of(tiny_vit())
    numbers = [((17, 17), (17, 14), (14, 14), (14, 9))]
    kept = [[17, 14, 14, 9]]
    mended = profiling._with_what_is_missing(table, numbers, table.total(kept) + 3.0)
    assert mended.total(kept) == pytest.approx(table.total(kept) + 3.0)
    assert mended.total([[17] * 4]) == table.total([[17] * 4])
    assert profiling._with_what_is_missing(table, numbers, table.total(kept) - 1) == table  # removing is never free


def test_a_compressed_model_stays_so() -> None:
    model = tiny_vit()
    compress(model, gflops="70%")
    images = tiny_images(model, 2)
    before = model(images)
    assert profile_model(model, batch_size=2, rounds=1).gflops == flops(model) / 1e9
    assert torch.equal(model(images), before)


def test_refused() -> None:
    with pytest.raises(InputValueError, match="rounds must be at least 1, got 0"):
        profile_model(tiny_vit(), rounds=0)
    with pytest.raises(InputValueError, match="batch_size must be at least 1, got 0"):
        profile_model(tiny_vit(), batch_size=0)
    with pytest.raises(InputValueError, match="EViT goes by the attention of a class token"):
        profile_model(tiny_caformer(), method="evit")


def test_the_plot() -> None:
    table = table_of(tiny_caformer())
    figure = draw_costs(table)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert list(lines["MLP half"]) == list(table.stages[0].mlp)
    whole = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].get_lines()}
    assert whole["as its FLOPs"][-1] == pytest.approx(whole["measured"][-1])
    share = table.stages[0].flops(table.stages[0].tokens[0]) / table.stages[0].flops(16)
    assert whole["as its FLOPs"][0] == pytest.approx(share * whole["measured"][-1])
    assert len(figure.axes) == 4
