"""A compressed model exported in standard operators: each against ours, and whole models through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer
from tiny_models import tiny_caformer, tiny_eva, tiny_images, tiny_predictors, tiny_schedule, tiny_vit
from torch import Tensor, nn

from diffrate_ext import (
    InputTypeError,
    InputValueError,
    compress,
    ops,
    standard_operators,
    to_standard_operators,
    uniform_schedule,
)
from diffrate_ext.methods import DynamicViT

B, H, D, C = 2, 3, 4, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sizes(tokens: int) -> Tensor:
    return 1 + 3 * torch.rand(B, tokens, generator=torch.Generator().manual_seed(1))


def check(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("with_sizes", [False, True])
def test_importance_and_order(prefix: int, with_sizes: bool) -> None:
    q, k, size = drawn(B, H, 9, D), drawn(B, H, 9, D, seed=1), sizes(9) if with_sizes else None
    if prefix:
        found = standard_operators.class_attention(q, k, size, 0.3, prefix)
        check([found], [ops.class_attention(q, k, size, scale=0.3, prefix=prefix)])
    found = standard_operators.received_attention(q, k, size, 0.3, prefix)
    check([found], [ops.received_attention(q, k, size, scale=0.3, prefix=prefix)])
    for importance_from in ("received", "class", "class_rows")[: 3 if prefix else 1]:
        options: Any = {"prefix": prefix, "importance_from": importance_from}
        expected = ops.proportional_attention(q, k, k, size, scale=0.3, **options)
        check(standard_operators.proportional_attention(q, k, k, size, 0.3, **options), expected)
    x = drawn(B, 9, C)
    check(standard_operators.sort_tokens(x, found, size, prefix), ops.sort_tokens(x, found, size, prefix=prefix))


@pytest.mark.parametrize("attn", [(9,), (H, 9), (H, 9, 9)])
@pytest.mark.parametrize("importance_from", ["class", "received"])
@pytest.mark.parametrize("mean_rule", ["mean", "weighted"])
@pytest.mark.parametrize("size_rule", ["cosine", "sum"])
@pytest.mark.parametrize(("k_p", "k_m"), [(9, 9), (7, 7), (9, 6), (7, 4)])
def test_prune_merge(
    attn: tuple[int, ...], importance_from: Any, mean_rule: Any, size_rule: Any, k_p: int, k_m: int
) -> None:
    for prefix in (1, 2):
        x, residual = drawn(B, 9, C), drawn(B, 9, C, seed=2)
        weights = drawn(B, *attn, seed=3).softmax(-1)
        weights = weights[:, prefix:] if weights.dim() == 2 else weights
        given = (x, weights, k_p, k_m, sizes(9))
        rules = {"importance_from": importance_from, "mean_rule": mean_rule, "size_rule": size_rule, "prefix": prefix}
        for options in (rules, {**rules, "residual": residual}):
            check(standard_operators.prune_merge(*given, **options), ops.prune_merge(*given, **options))
    check(
        standard_operators.prune_merge(x, weights, k_p, k_m, prefix=2), ops.prune_merge(x, weights, k_p, k_m, prefix=2)
    )


def test_norms() -> None:
    x, residual, importance = drawn(B, 9, C), drawn(B, 9, C, seed=2), drawn(B, 8, seed=3)
    for norm in (ops.Norm(drawn(C, seed=4), drawn(C, seed=5), 1e-6), ops.Norm(drawn(C, seed=4), None, 1e-5)):
        check(standard_operators.add_norm(x, residual, *norm), ops.add_norm(x, residual, norm))
        found = standard_operators.prune_merge_norm(x, importance, 7, 4, *norm, sizes(9))
        check(found, ops.prune_merge(x, importance, 7, 4, sizes(9), norm=norm))


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("tokens", [9, 10])
def test_matching_and_merging(prefix: int, tokens: int) -> None:
    keys = drawn(B, H, tokens, D)
    for merged in (0, 1, 3):
        slot = ops.bipartite_match(keys, merged, prefix=prefix)
        assert torch.equal(standard_operators.bipartite_match(keys, merged, prefix), slot)
        assert torch.equal(
            standard_operators.bipartite_match(keys[:, 0], merged, prefix),
            ops.bipartite_match(keys[:, 0], merged, prefix=prefix),
        )
        x, weights, residual = drawn(B, tokens, C), sizes(tokens), drawn(B, tokens, C, seed=2)
        slot[:, -1] = -1  # one goes nowhere, and one place is empty
        for options in ({}, {"weights": weights}, {"weights": weights, "residual": residual}):
            found = standard_operators.merge_reduce(x, slot, tokens, **options)
            check([found], [ops.merge_reduce(x, slot, tokens, **options)])


def exported(model: nn.Module, method: str, *, grad: bool) -> tuple[nn.Module, torch.export.ExportedProgram, Tensor]:
    """Compressed by the method, with weights that tell tokens apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.05)
    with_predictors = DynamicViT(tiny_predictors(model)) if method == "dynamicvit" else method
    caformer = isinstance(model, MetaFormer)  # which so few FLOPs cannot be had of
    schedule = tiny_schedule(model) if caformer else uniform_schedule(model, "60%", method=with_predictors)
    compress(model.eval(), schedule, method=with_predictors)
    images = tiny_images(model)
    with torch.set_grad_enabled(grad):  # without gradients more is fused
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    return model, program, images


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "diffrate": (tiny_vit, "diffrate"),
    "no class token": (lambda: tiny_vit(class_token=False, global_pool="avg"), "diffrate"),
    "registers, pooling by attention": (lambda: tiny_vit(reg_tokens=3, global_pool="map"), "diffrate"),
    "tome": (tiny_vit, "tome"),
    "rotary": (tiny_eva, "diffrate"),
    "rotary, tome": (tiny_eva, "tome"),
    "evit": (tiny_vit, "evit"),
    "dynamicvit": (tiny_vit, "dynamicvit"),
    "caformer": (tiny_caformer, "diffrate"),
    "caformer, tome": (tiny_caformer, "tome"),
}


@pytest.mark.parametrize(("name", "grad"), [*((name, False) for name in MODELS), ("diffrate", True)])
def test_models(name: str, grad: bool, tmp_path: Path) -> None:
    make, method = MODELS[name]
    model, program, images = exported(make(), method, grad=grad)
    assert "diffrate" in str(program.graph)
    standard = to_standard_operators(program)
    assert "diffrate" not in str(standard.graph)
    with torch.no_grad():
        for some in (images, images[:1], torch.cat((images, images + 1))):
            torch.testing.assert_close(standard.module()(some), model(some), atol=1e-5, rtol=1e-4)

    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(standard, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with torch.no_grad():
        for some in (images, images[:1], torch.cat((images, images + 1))):
            (found,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), model(some), atol=1e-4, rtol=1e-4)


def test_no_scatter_adds_up() -> None:
    """Runtimes are slow at it."""
    _, program, _ = exported(tiny_vit(), "diffrate", grad=False)
    graph = str(to_standard_operators(program).graph)
    assert "topk" in graph
    assert "scatter_add" not in graph
    assert "scatter_reduce" not in graph


class Masked(nn.Module):
    """Attention of a head of the caller's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q + 1, q, **self.options)


def test_attention_with_masks() -> None:
    q = drawn(B, H, 5, D)
    mask = (torch.arange(5) < 3)[None]
    for given in (mask, mask.float()):
        model = Masked(attn_mask=given, scale=0.4)
        found = to_standard_operators(torch.export.export(model, (q,))).module()(q)
        torch.testing.assert_close(found, model(q))
    with pytest.raises(InputValueError, match="causal"):
        to_standard_operators(torch.export.export(Masked(is_causal=True), (q,)))


def test_other_things_are_refused() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    with pytest.raises(InputTypeError, match=r"expected what torch\.export\.export returns, got VisionTransformer"):
        to_standard_operators(model)  # type: ignore[arg-type]
