"""DynamicViT: what its predictors say, what stays, and where they are kept."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import spread_weights, tiny_images, tiny_predictors, tiny_vit
from torch import Tensor, nn

from diffrate_ext import Schedule, compare, compress, flops, uniform_schedule
from diffrate_ext.errors import InputTypeError, InputValueError
from diffrate_ext.methods import DynamicViT, Predictors
from diffrate_ext.methods.dynamicvit import DropByScore
from diffrate_ext.methods.predictors import Predictor
from diffrate_ext.models import adapter_for
from diffrate_ext.models.adapter import TokenRules
from diffrate_ext.models.compressed import TokenState

SCHEDULE = Schedule(None, [17, 12, 12, 8])


def plain_log_probabilities(predictor: Predictor, patches: Tensor) -> Tensor:
    """The paper's formulas, patch by patch, of one image's patches (n, C)."""
    features = [F.gelu(predictor.embed(predictor.norm(patch))) for patch in patches]
    half = patches.shape[1] // 2
    mean = sum(feature[half:] for feature in features) / len(features)
    first = torch.cat([predictor.own.weight, predictor.shared.weight], dim=1)
    found = []
    for feature in features:
        both = torch.cat([feature[:half], mean])
        hidden = F.gelu(predictor.hidden(F.gelu(first @ both + predictor.own.bias)))
        found.append(predictor.decide(hidden).log_softmax(0))
    return torch.stack(found)


@given(
    images=st.integers(1, 3),
    patches=st.integers(1, 9),
    prefix=st.integers(0, 2),
    dropped=st.integers(0, 9),
    channels=st.sampled_from([8, 12, 20]),
    seed=st.integers(0, 99),
)
def test_the_step_beside_a_plain_one(
    images: int, patches: int, prefix: int, dropped: int, channels: int, seed: int
) -> None:
    tokens, kept = prefix + patches, prefix + max(0 if prefix else 1, patches - dropped)
    predictor = spread_weights(Predictor(channels)).double()
    torch.manual_seed(seed)
    x, branch = torch.randn(2, images, tokens, channels, dtype=torch.float64)
    q = torch.randn(3, images, 2, tokens, 4, dtype=torch.float64)
    rules = TokenRules(prefix, "class" if prefix else "received")
    step = DropByScore(rules, kept, predictor, TokenState())
    torch.testing.assert_close(step.attend(*q, scale=0.5), F.scaled_dot_product_attention(*q, scale=0.5))
    found = step.reduce(x, branch)

    assert found.shape == (images, kept, channels)
    total = x + branch
    for image in range(images):
        scores = plain_log_probabilities(predictor, total[image, prefix:])[:, 0].tolist()
        order = [*range(prefix), *(prefix + i for i in sorted(range(patches), key=lambda i: -scores[i]))]
        if kept == tokens:
            order = list(range(tokens))
            assert step.slot is None
        else:
            assert step.slot is not None
            assert [int(step.slot[image, token]) for token in order] == [
                place if place < kept else -1 for place in range(tokens)
            ]
        torch.testing.assert_close(found[image], total[image, order[:kept]])
    assert step.after.size is None or (step.after.size == 1).all()


@given(seed=st.integers(0, 99), there=st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_mask_leaves_out_of_the_mean_what_is_gone(seed: int, there: list[bool]) -> None:
    predictor = spread_weights(Predictor(12)).double()
    torch.manual_seed(seed)
    x, mask = torch.randn(6, 12, dtype=torch.float64), torch.tensor(there)
    found = predictor(x[None], mask[None].double())[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6, dtype=torch.float64))
    if any(there):
        torch.testing.assert_close(found[mask], plain_log_probabilities(predictor, x[mask]))


def test_the_usual_schedule_keeps_the_same_share_three_times() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        method = DynamicViT(Predictors.untrained(adapter_for(model), [3, 6, 9]))
    kept = uniform_schedule(model, 3.0, method=method).after_merging
    assert [block for block in range(1, 12) if kept[block] < kept[block - 1]] == [3, 6, 9]
    shares = [(kept[block] - 1) / (kept[block - 1] - 1) for block in (3, 6, 9)]
    assert max(shares) - min(shares) <= 1 / kept[6]


def test_the_model_keeps_its_parameters_and_the_method_the_predictors() -> None:
    model = tiny_vit()
    names, parameters, predictors = list(model.state_dict()), list(model.parameters()), tiny_predictors(model)
    compress(model, SCHEDULE, method=DynamicViT(predictors))
    assert list(model.state_dict()) == names
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    assert sum(1 for _ in model.modules()) == sum(1 for _ in tiny_vit().modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predictors_follow_the_model_to_another_dtype(dtype: torch.dtype) -> None:
    model = tiny_vit()
    predictors = tiny_predictors(model)
    images = tiny_images(model)
    with torch.no_grad():
        wanted = compress(model, SCHEDULE, method=DynamicViT(predictors))(images)
        model.to(dtype)
        found = model(images.to(dtype))
        again = copy.deepcopy(model)(images.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(again, found)
    if dtype == torch.float64:
        torch.testing.assert_close(found.float(), wanted)
    assert all(p.dtype == torch.float32 for p in predictors.parameters())  # they do not lose what they have learnt
    assert all(len(predictor._copies) == (block in (1, 3)) for block, predictor in of_blocks(predictors))


def of_blocks(predictors: Predictors) -> list[tuple[int, Any]]:
    return [(block, predictors.get(block)) for block in predictors.blocks]


def test_exported_in_a_dtype_that_no_predictor_has_seen() -> None:
    model = tiny_vit()
    predictors = tiny_predictors(model)
    compress(model, SCHEDULE, method=DynamicViT(predictors)).double()
    images = tiny_images(model).double()
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), model(images))


def test_fused_norms_change_nothing() -> None:
    """Without gradients one kernel adds and normalises for the predictor."""
    predictor = spread_weights(Predictor(16)).requires_grad_(False)
    x, branch = torch.randn(2, 3, 9, 16)
    fused = predictor.scores(x, branch, 1)
    predictor.norm.register_forward_hook(lambda *_: None)  # which stops the fusing
    torch.testing.assert_close(fused, predictor.scores(x, branch, 1))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_vit()
    model.pretrained_cfg = {"architecture": "tiny", "tag": "one"}  # type: ignore[assignment]
    file = tmp_path / "predictors.safetensors"
    predictors = tiny_predictors(model)
    predictors.save(file)
    loaded = Predictors.load(file)
    for name in ("channels", "depth", "blocks", "model"):
        assert getattr(loaded, name) == getattr(predictors, name)
    assert loaded.model == "tiny.one"
    assert not any(p.requires_grad for p in loaded.parameters())
    images = tiny_images(model)
    with torch.no_grad():
        wanted = compress(model, SCHEDULE, method=DynamicViT(predictors))(images)
        for path in (file, str(file)):
            torch.testing.assert_close(compress(model, SCHEDULE, method=DynamicViT(path))(images), wanted)

    model.pretrained_cfg = {"architecture": "tiny", "tag": "two"}  # type: ignore[assignment]
    with pytest.raises(InputValueError, match=r"trained for tiny\.one, and the model is tiny\.two"):
        compress(model, SCHEDULE, method=DynamicViT(file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        DynamicViT(file)
    file.write_text("nothing of the kind")
    with pytest.raises(InputValueError, match="holds no predictors"):
        DynamicViT(file)
    save_file(tiny_vit().state_dict(), file)
    with pytest.raises(InputValueError, match="holds no predictors as train_predictors makes them"):
        DynamicViT(file)
    predictors = tiny_predictors(tiny_vit())
    predictors.blocks = (1,)  # the file then holds more than its metadata says
    predictors.save(file)
    with pytest.raises(InputValueError, match="holds no predictors"):
        DynamicViT(file)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_vit(depth=5), "the predictors are for 4 blocks of 16 channels, the model has 5 of 16"),
        (lambda: tiny_vit(embed_dim=24), "the predictors are for 4 blocks of 16 channels, the model has 4 of 24"),
    ],
)
def test_another_model_is_refused(model: Any, message: str) -> None:
    other = model()
    schedule = Schedule(None, [12] * len(other.blocks))
    with pytest.raises(InputValueError, match=re.escape(message)):
        compress(other, schedule, method=DynamicViT(tiny_predictors(tiny_vit())))


def test_a_block_without_a_predictor_removes_nothing() -> None:
    model = tiny_vit()
    some = DynamicViT(Predictors.untrained(adapter_for(model), [2, 1]))
    compress(model, Schedule(None, [17, 12, 8, 8]), method=some)
    with pytest.raises(InputValueError, match="removes tokens in block 3, and the predictors are for 1, 2: train some"):
        compress(model, SCHEDULE, method=some)
    with pytest.raises(InputValueError, match="removes tokens in block 0, and"):
        compress(model, Schedule(None, [16, 16, 16, 16]), method=some)
    with pytest.raises(InputTypeError, match="predictors must be Predictors or a file, got Linear"):
        DynamicViT(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_compared_with_other_methods() -> None:
    model = tiny_vit()
    target = [0.8 * flops(model) / 1e9]
    methods = ["random", DynamicViT(tiny_predictors(model))]
    rows = compare(model, [tiny_images(model)], target, methods, rounds=1, batch_size=2)
    assert [row.method for row in rows] == ["uncompressed", "random", "dynamicvit"]
    assert rows[2].gflops == pytest.approx(target[0], rel=0.1)
