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
    out = tensors(function(*inputs))[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return list(torch.autograd.grad(out, inputs[:count], weights))


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
            cases[f"merge_reduce, {label}"] = (_raw.merge_reduce, (x, dst, 5, size))
            grad = floats(2, 5, 6, dtype=dtype, gradient=gradient)
            cases[f"merge_reduce_backward, {label}"] = (_raw.merge_reduce_backward, (grad, dst, size))
        x = floats(2, 6, 9, gradient=gradient)
        cases[f"sort_tokens, bare, {kind}"] = (_raw.sort_tokens, (x.transpose(1, 2), floats(2, 9, dtype=half)))
        attn = floats(2, 3, 9, 9, dtype=half)
        received = (x.transpose(1, 2), attn, 9, 2, None, 0, "received", "mean", "sum")
        cases[f"prune_merge, received, {kind}"] = (_raw.prune_merge, received)
        cases[f"prune_merge, only pruning, {kind}"] = (_raw.prune_merge, (x.transpose(1, 2), floats(2, 8), 4, 4))
        cases[f"merge_reduce, bare, {kind}"] = (_raw.merge_reduce, (x.transpose(1, 2), dst, 7))
        cases[f"merge_reduce_backward, bare, {kind}"] = (_raw.merge_reduce_backward, (x, dst))
    for dtype in (torch.float32, half, double):
        q, k, _ = floats(2, 9, 3, 2, 8, dtype=dtype).permute(2, 0, 3, 1, 4)
        size = floats(2, 9, dtype=double if dtype == double else torch.float32)
        cases[f"class_attention, {dtype}"] = (_raw.class_attention, (q, k, size, 0.5, 2))
        cases[f"received_attention, {dtype}"] = (_raw.received_attention, (q, k, size, 0.5))
        cases[f"class_attention, bare, {dtype}"] = (_raw.class_attention, (q.contiguous(), k.contiguous(), None, 1.0))
        cases[f"received_attention, prefix, {dtype}"] = (_raw.received_attention, (q, k, None, -0.5, 1))
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("operator", "arguments"), opcheck_cases())
def test_opcheck(device: torch.device, operator: Any, arguments: tuple) -> None:
    def move(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return argument.detach().to(device).requires_grad_(argument.requires_grad)

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
            if tensor.shape[0] == images:
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
            if tensor.shape[0] == images:
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
    again = ops.merge_reduce(x, ops.compose_slots(first, order.argsort(1)), 9)
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


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block(q, k, v, x, size)


def test_export_with_any_batch_size(device: torch.device) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = block_inputs(device, 3)
    exported = torch.export.export(Block(), tuple(inputs), dynamic_shapes=({0: batch},) * len(inputs))
    targets = {str(node.target) for node in exported.graph.nodes}
    for name in ("sort_tokens", "prune_merge", "merge_reduce", "class_attention", "received_attention"):
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
