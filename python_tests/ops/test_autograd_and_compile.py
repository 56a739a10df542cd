"""What every operator promises to torch: opcheck, torch.compile, export, inference_mode, autocast, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same
from samples import SAMPLES, Sample, tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffrate_ext import ops
from diffrate_ext.ops import _attention

_raw = torch.ops.diffrate


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLES[request.param]


def inputs_on(device: torch.device, sample: Sample, images: int, gradients: bool = False) -> list[Tensor]:
    inputs = [tensor.to(device) for tensor in sample.inputs(images)]
    for tensor in inputs[: sample.differentiable]:
        tensor.requires_grad_(gradients)
    return inputs


def gradients_of(function: Any, inputs: list[Tensor], count: int) -> list[Tensor]:
    """Of all that the function's results say of the first ``count`` inputs; no gradient is a zero one."""
    results = [out for out in tensors(function(*inputs)) if out.requires_grad]
    weights = [
        torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape) for out in results
    ]
    gradients = torch.autograd.grad(results, inputs[:count], weights, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, gradients, strict=False)]


def opcheck_cases() -> list[Any]:
    random = torch.Generator().manual_seed(0)

    def floats(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = False) -> Tensor:
        return torch.rand(shape, generator=random).to(dtype).requires_grad_(gradient)

    dst = torch.randint(-1, 5, (2, 9), generator=random)
    half, double = torch.float16, torch.float64
    cases: dict[str, tuple[Any, tuple]] = {}
    for gradient in (False, True):
        kind = "with gradient" if gradient else "no gradient"
        for dtype in (torch.float32, torch.bfloat16, double):
            wide = double if dtype == double else torch.float32
            x = floats(2, 9, 6, dtype=dtype, gradient=gradient)
            size = floats(2, 9, dtype=wide)
            label = f"{kind}, {dtype}"
            cases[f"sort_tokens, {label}"] = (_raw.sort_tokens, (x, floats(2, 8), size, 1))
            options = ("class", "weighted", "cosine", floats(2, 9, 6, dtype=dtype, gradient=gradient))
            cases[f"prune_merge, {label}"] = (_raw.prune_merge, (x, floats(2, 3, 9), 8, 5, size, 1, *options))
            if not gradient:  # it refuses to be differentiated
                norm = floats(6, dtype=dtype), floats(6, dtype=dtype), 1e-6
                cases[f"prune_merge_norm, {label}"] = (
                    _raw.prune_merge_norm,
                    (x, floats(2, 3, 9), 8, 5, *norm, size, 1, *options),
                )
                cases[f"add_norm, {label}"] = (_raw.add_norm, (x, floats(2, 9, 6, dtype=dtype), *norm))
            cases[f"merge_reduce, {label}"] = (_raw.merge_reduce, (x, dst, 5, size, options[3]))
            grad = floats(2, 5, 6, dtype=dtype, gradient=gradient)
            cases[f"merge_reduce_backward, {label}"] = (_raw.merge_reduce_backward, (grad, dst, size))
        x = floats(2, 6, 9, gradient=gradient)
        cases[f"sort_tokens, bare, {kind}"] = (_raw.sort_tokens, (x.transpose(1, 2), floats(2, 9, dtype=half)))
        attn = floats(2, 3, 9, 9, dtype=half)
        received = (x.transpose(1, 2), attn, 9, 2, None, 0, "received", "mean", "sum")
        cases[f"prune_merge, received, {kind}"] = (_raw.prune_merge, received)
        cases[f"prune_merge, only pruning, {kind}"] = (_raw.prune_merge, (x.transpose(1, 2), floats(2, 8), 4, 4))
        norm = floats(6), None, 0.1
        cases["prune_merge_norm, bare"] = (
            _raw.prune_merge_norm,
            (x.detach().transpose(1, 2), floats(2, 8), 4, 4, *norm),
        )
        cases["add_norm, bare"] = (_raw.add_norm, (*[x.detach().transpose(1, 2)] * 2, *norm))
        cases[f"merge_reduce, bare, {kind}"] = (_raw.merge_reduce, (x.transpose(1, 2), dst, 7))
        cases[f"merge_reduce_backward, bare, {kind}"] = (_raw.merge_reduce_backward, (x, dst))
    for dtype in (torch.float32, half, double):
        q, k, _ = floats(2, 9, 3, 2, 8, dtype=dtype).permute(2, 0, 3, 1, 4)
        size = floats(2, 9, dtype=double if dtype == double else torch.float32)
        cases[f"bipartite_match, {dtype}"] = (_raw.bipartite_match, (k, 3, 2))
        cases[f"bipartite_match, bare, {dtype}"] = (_raw.bipartite_match, (k.transpose(2, 3)[:, 0], 3))
        cases[f"class_attention, {dtype}"] = (_raw.class_attention, (q, k, size, 0.5, 2))
        cases[f"received_attention, {dtype}"] = (_raw.received_attention, (q, k, size, 0.5))
        cases[f"class_attention, bare, {dtype}"] = (_raw.class_attention, (q.contiguous(), k.contiguous(), None, 1.0))
        cases[f"received_attention, prefix, {dtype}"] = (_raw.received_attention, (q, k, None, -0.5, 1))
        for importance_from in ("class", "class_rows", "received", "none"):
            label = f"proportional_attention, {importance_from}, {dtype}"
            cases[label] = (_raw.proportional_attention, (q, k, q, size, 0.5, 2, importance_from))
    for gradient in (False, True):
        for dtype in (torch.float32, torch.bfloat16, double):
            wide = double if dtype == double else torch.float32
            kind = f"{'with gradient' if gradient else 'no gradient'}, {dtype}"
            heads = [floats(2, 3, 9, 8, dtype=dtype, gradient=gradient) for _ in range(4)]
            mask, size = (floats(2, 9) < 0.6).to(wide).requires_grad_(gradient), 1 + floats(2, 9, dtype=wide)
            cases[f"masked_attention, {kind}"] = (_raw.masked_attention, (*heads[:3], mask, size, 0.5, 2, "received"))
            cases[f"masked_attention, bare, {kind}"] = (
                _raw.masked_attention,
                (*heads[:3], mask, None, 0.5, 1, "class", "difference"),
            )
            grad, *heads = (head.detach() for head in heads)  # it refuses to be differentiated
            cases[f"masked_attention_backward, {kind}"] = (
                _raw.masked_attention_backward,
                (grad, *heads, mask.detach(), size, 0.5, "difference"),
            )
            rates = [floats(9, dtype=wide, gradient=gradient) for _ in range(2)]
            x, importance = floats(2, 9, 6, dtype=dtype, gradient=gradient), floats(2, 8)
            for kept_p, kept_m in ((7.0, 4.0), (9.0, 4.0), (5.0, 5.0), (9.0, 9.0)):
                kept = [torch.tensor(number, dtype=wide) for number in (kept_p, kept_m)]
                alive = torch.ones(2, 9, dtype=wide, requires_grad=gradient)
                cases[f"masked_prune_merge, {kept_p}, {kept_m}, {kind}"] = (
                    _raw.masked_prune_merge,
                    (x, alive, importance, size, *rates, *kept, 1, "sum"),
                )
            bare = (x.transpose(1, 2).contiguous().transpose(1, 2), mask, importance, None, *rates, *kept)
            cases[f"masked_prune_merge, bare, {kind}"] = (_raw.masked_prune_merge, bare)
            choices = torch.arange(9).flip(0).expand(2, -1), dst.clamp_min(0)
            arrived = floats(2, 9, 6, dtype=dtype), floats(2, 9, dtype=wide)  # it refuses to be differentiated
            for name, gradients in {"all": arrived, "x": (arrived[0], None), "mask": (None, arrived[1])}.items():
                cases[f"masked_prune_merge_backward, {name}, {kind}"] = (
                    _raw.masked_prune_merge_backward,
                    (*gradients, mask.detach(), *choices, *kept, 1),
                )
        for dtype in (torch.float32, double):
            kind = f"{'with gradient' if gradient else 'no gradient'}, {dtype}"
            logits = floats(3, 5, dtype=dtype, gradient=gradient)
            cases[f"compression_rate, {kind}"] = (_raw.compression_rate, (logits, 9, 2, 0))
            cases[f"compression_rate, bare, {kind}"] = (_raw.compression_rate, (logits.t().contiguous().t(), 5))
        grads = floats(3), floats(3, 10)
        cases["compression_rate_backward"] = (
            _raw.compression_rate_backward,
            (*grads, logits.detach().float(), 9, 2, 1),
        )
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("operator", "arguments"), opcheck_cases())
def test_opcheck(device: torch.device, operator: Any, arguments: tuple) -> None:
    def move(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return argument.detach().to(device).requires_grad_(argument.requires_grad)

    if operator is _raw.proportional_attention and device.type != _attention.CUDA:
        pytest.skip("torch's fused attention serves there")
    torch.library.opcheck(operator.default, tuple(move(argument) for argument in arguments))


def test_opcheck_knows_every_operator() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("diffrate::")
    }
    assert registered == {case.values[0].__name__ for case in opcheck_cases()}


def test_compiled_once_for_all_batch_sizes(device: torch.device, sample: Sample) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample.function, backend=counter, fullgraph=True)
    for images in (2, 3, 5):
        inputs = inputs_on(device, sample, images)
        expected = tensors(sample.function(*inputs))
        for tensor in inputs:
            if tensor.ndim > 0 and tensor.shape[0] == images:
                torch._dynamo.mark_dynamic(tensor, 0)
        for index, (a, b) in enumerate(zip(tensors(compiled(*inputs)), expected, strict=True)):
            assert_same(f"result {index}, {images} images", a, b)
            assert a.stride() == b.stride()
    assert counter.frame_count == 1


def test_compiled_gradients(device: torch.device, sample: Sample) -> None:
    if sample.differentiable == 0:
        for result in tensors(sample.function(*inputs_on(device, sample, 2))):
            assert not result.requires_grad
        return
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample.function, backend=counter, fullgraph=True)
    for images in (2, 3):
        inputs = inputs_on(device, sample, images, gradients=True)
        expected = gradients_of(sample.function, inputs, sample.differentiable)
        for tensor in inputs:
            if tensor.ndim > 0 and tensor.shape[0] == images:
                torch._dynamo.mark_dynamic(tensor, 0)
        actual = gradients_of(compiled, inputs, sample.differentiable)
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            torch.testing.assert_close(a, b, msg=lambda message, index=index: f"gradient {index}: {message}")
    assert counter.frame_count == 1


def block(q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All operators as a compressed model strings them together."""
    out, importance = ops.proportional_attention(q, k, v, size)
    assert importance is not None
    residual = out.transpose(1, 2).flatten(2)
    y, size, first = ops.prune_merge(x, importance, 14, 9, size, residual=residual)
    y, size, order = ops.sort_tokens(y * 2, size[:, 1:] + ops.received_attention(q, k, prefix=9), size)
    again = ops.merge_reduce(x, ops.bipartite_match(k, 5), 12)[:, :9]
    again = again + ops.merge_reduce(x, ops.compose_slots(first, order.argsort(1)), 9)
    return ops.restore_tokens(y + again, first), size, ops.class_attention(q, k)


def block_inputs(device: torch.device, images: int) -> list[Tensor]:
    qkv = torch.randn(images, 17, 3, 2, 8, device=device).permute(2, 0, 3, 1, 4)
    return [*qkv.unbind(0), torch.randn(images, 17, 16, device=device), 1 + torch.rand(images, 17, device=device)]


def test_inductor(device: torch.device) -> None:
    """The default compiler, forward and backward: our operators read what its kernels write, and the reverse."""

    def function(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, size, slot = ops.prune_merge(x * 2, ops.class_attention(q, k), 14, 9, residual=x.square())
        return (ops.merge_reduce(x, slot, 9) + out).tanh(), size, slot

    torch._dynamo.reset()
    q, k, _, x, _ = block_inputs(device, 2)
    x.requires_grad_()
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(compiled(x, q, k), function(x, q, k), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients_of(compiled, [x, q, k], 1), gradients_of(function, [x, q, k], 1))


def test_inductor_in_a_search_step(device: torch.device) -> None:
    """Forward and backward through all three operators of the search, from the rates to the loss."""

    def function(logits: Tensor, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        kept, prob = ops.compression_rate(logits, 16, 2)
        out, importance = ops.masked_attention(q, q * 0.5, q + 1, mask)
        y = x + out.transpose(1, 2).flatten(2)
        y, mask, size, _, _ = ops.masked_prune_merge(y, mask, importance, None, prob[0], prob[1], kept[0], kept[1])
        return (y.tanh() * (mask * size)[..., None]).sum(1)

    torch._dynamo.reset()
    q, _, _, x, _ = block_inputs(device, 2)
    logits = torch.tensor([[2.0] * 3 + [0] * 5, [0.0] * 8], device=device)
    inputs = [tensor.detach().requires_grad_() for tensor in (logits, q, x, torch.ones(2, 17, device=device))]
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    actual, expected = gradients_of(compiled, inputs, 4), gradients_of(function, inputs, 4)
    torch.testing.assert_close(actual, expected)
    for gradient in expected:
        assert gradient.abs().sum() > 0


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block(q, k, v, x, size)


def test_export_with_any_batch_size(device: torch.device) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = block_inputs(device, 3)
    exported = torch.export.export(Block(), tuple(inputs), dynamic_shapes=({0: batch},) * len(inputs))
    targets = {str(node.target) for node in exported.graph.nodes}
    for name in (
        "sort_tokens",
        "prune_merge",
        "merge_reduce",
        "bipartite_match",
        "class_attention",
        "received_attention",
    ):
        assert f"diffrate.{name}.default" in targets
    for images in (3, 7):
        inputs = block_inputs(device, images)
        for a, b in zip(exported.module()(*inputs), block(*inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_inference_mode(device: torch.device, sample: Sample) -> None:
    inputs = inputs_on(device, sample, 2)
    expected = tensors(sample.function(*inputs))
    with torch.inference_mode():
        actual = tensors(sample.function(*(tensor.clone() for tensor in inputs)))
    for a, b in zip(actual, expected, strict=True):
        assert a.is_inference()
        assert_same("result", a, b)


def test_same_bits_twice(device: torch.device, sample: Sample) -> None:
    inputs = inputs_on(device, sample, 5)
    first = tensors(sample.function(*inputs))
    for a, b in zip(first, tensors(sample.function(*inputs)), strict=True):
        assert_same("result", a, b)


def test_results_do_not_share_memory_with_inputs(device: torch.device, sample: Sample) -> None:
    """An operator that returned a view, or wrote into its inputs, would break whoever changes either."""
    inputs = inputs_on(device, sample, 2)
    before = [tensor.clone() for tensor in inputs]
    results = tensors(sample.function(*inputs))
    for result in results:
        result.fill_(7)
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same("input", tensor, copy)


def test_second_backward_is_right_or_raises(device: torch.device) -> None:
    """A gradient of a gradient, which a missing formula would silently make zero."""
    x = torch.randn(1, 6, 3, dtype=torch.float64, device=device, requires_grad=True)
    importance = torch.rand(1, 6, device=device)
    dst = torch.tensor([[0, 0, 1, 2, -1, 2]], device=device)
    for out in (
        ops.sort_tokens(x, importance)[0],
        ops.prune_merge(x, importance, 5, 3)[0],
        ops.merge_reduce(x, dst, 3),
    ):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.abs().sum() > 0


def test_autocast_leaves_the_search_operators_as_they_are(device: torch.device) -> None:
    """They choose their own precision: a kept number from half-precision sums would be wrong."""
    for name in ("masked_attention", "compression_rate", "masked_prune_merge"):
        sample = SAMPLES[name]
        inputs = inputs_on(device, sample, 3, gradients=True)
        expected = tensors(sample.function(*inputs))
        gradients = gradients_of(sample.function, inputs, sample.differentiable)
        with torch.autocast(device.type, torch.bfloat16):
            actual = tensors(sample.function(*inputs))
            actual_gradients = gradients_of(sample.function, inputs, sample.differentiable)
        for a, b in zip([*actual, *actual_gradients], [*expected, *gradients], strict=True):
            assert_same(name, a, b)


def test_autocast_of_a_search_step(device: torch.device) -> None:
    """Half-precision attention beside a float32 stream, float32 masks and float32 rates."""
    linear = nn.Linear(16, 48, device=device)
    x = torch.randn(2, 17, 16, device=device, requires_grad=True)
    logits = torch.randn(2, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        kept, prob = ops.compression_rate(logits, 16)
        q, k, v = linear(x).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = torch.ones(2, 17, device=device, requires_grad=True)
        out, importance = ops.masked_attention(q, k, v, mask)
        assert (out.dtype, importance.dtype) == (torch.bfloat16, torch.float32)
        y = x + out.transpose(1, 2).flatten(2)
        y, mask, size, _, _ = ops.masked_prune_merge(y, mask, importance, None, prob[0], prob[1], kept[0], kept[1])
        assert y.dtype == mask.dtype == size.dtype == torch.float32
        (y.sum() + mask.square().sum()).backward()
    for leaf in (x, logits, linear.weight):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_autocast(device: torch.device, residual_dtype: torch.dtype) -> None:
    """Under autocast the attention branch is half precision beside a float32 stream; the stream keeps its dtype."""
    linear = nn.Linear(16, 48, device=device)
    x = torch.randn(2, 17, 16, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        q, k, v = linear(x).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        assert q.dtype == torch.bfloat16
        out, importance = ops.proportional_attention(q, k, v, torch.ones(2, 17, device=device))
        assert out.dtype == torch.bfloat16
        assert importance is not None
        assert importance.dtype == torch.float32
        residual = out.transpose(1, 2).flatten(2).to(residual_dtype)
        y, size, slot = ops.prune_merge(x, importance, 14, 9, residual=residual)
        assert y.dtype == torch.float32
        assert size.dtype == torch.float32
        merged = ops.merge_reduce(x + residual, slot, 9)
        torch.testing.assert_close(y, merged)
        restored = ops.restore_tokens(y, slot, torch.ones(16, device=device))
        assert restored.dtype == torch.float32
        (gradient,) = torch.autograd.grad(restored.sum(), x)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_meta_tensors(sample: Sample) -> None:
    """The fake kernels alone: results of the right shape and dtype without any data."""
    inputs = sample.inputs(3)
    expected = tensors(sample.function(*inputs))
    actual = tensors(sample.function(*(tensor.to("meta") for tensor in inputs)))
    for a, b in zip(actual, expected, strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
