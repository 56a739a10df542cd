"""The transforms of torch.func on the operators: reverse mode is right, forward mode is right or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from compare import assert_same, assert_within
from samples import SAMPLES, Sample, tensors
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffrate_ext import ops

Loss = Callable[..., Tensor]

DIFFERENTIABLE = [name for name, sample in SAMPLES.items() if sample.differentiable]
FORWARD_MODE = ("add_norm", "restore_tokens")
"""These are torch's operators where a derivative is wanted."""
TWICE = ("sort_tokens", "prune_merge", "merge_reduce", "add_norm", "proportional_attention", "restore_tokens")
REFUSED = "no forward-mode derivative .* reverse mode"
EXACT = 1e-9


@pytest.fixture(params=DIFFERENTIABLE)
def sample(request: pytest.FixtureRequest) -> Sample:
    return SAMPLES[request.param]


def doubles(sample: Sample, device: torch.device) -> list[Tensor]:
    return [t.to(device, torch.float64 if t.is_floating_point() else t.dtype) for t in sample.inputs(2)]


def stacked(inputs: list[Tensor]) -> list[Tensor]:
    """Two cases in one tensor. Rates have no images, so both cases have theirs."""
    return [torch.stack([t, t.flip(0) if t.ndim > 1 else t]) for t in inputs]


def loss_of(sample: Sample) -> Loss:
    """Weighted squares of all results, so that no two elements are worth the same."""

    def loss(*inputs: Tensor) -> Tensor:
        floats = [out for out in tensors(sample.function(*inputs)) if out.is_floating_point()]
        weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in floats]
        return torch.stack([(out.square() * weight).sum() for out, weight in zip(floats, weights, strict=True)]).sum()

    return loss


def numbers_of(sample: Sample) -> tuple[int, ...]:
    return tuple(range(sample.differentiable))


def backward(loss: Loss, sample: Sample, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """What plain autograd says."""
    leaves = [t.detach().requires_grad_(i < sample.differentiable) for i, t in enumerate(inputs)]
    wanted = leaves[: sample.differentiable]
    return list(torch.autograd.grad(loss(*leaves), wanted, create_graph=create_graph, materialize_grads=True))


def by_case(loss: Loss, sample: Sample, many: list[Tensor]) -> list[Tensor]:
    cases = [backward(loss, sample, [t[i] for t in many]) for i in range(2)]
    return [torch.stack(gradients) for gradients in zip(*cases, strict=True)]


def assert_equal(actual: tuple[Tensor, ...] | list[Tensor], expected: list[Tensor], bound: float = EXACT) -> None:
    assert any(t.abs().sum() > 0 for t in expected)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_within(f"gradient {number}", a, b, bound)


def test_grad_and_vjp(device: torch.device, sample: Sample) -> None:
    loss, inputs = loss_of(sample), doubles(sample, device)
    expected = backward(loss, sample, inputs)
    assert_equal(func.grad(loss, numbers_of(sample))(*inputs), expected)
    constants = inputs[sample.differentiable :]
    value, vjp = func.vjp(lambda *t: loss(*t, *constants), *inputs[: sample.differentiable])
    assert_equal(vjp(torch.ones_like(value)), expected)


def test_vmap_of_grad(device: torch.device, sample: Sample) -> None:
    """Gradients per case."""
    loss, many = loss_of(sample), stacked(doubles(sample, device))
    assert_equal(func.vmap(func.grad(loss, numbers_of(sample)))(*many), by_case(loss, sample, many))


def test_grad_of_vmap(device: torch.device, sample: Sample) -> None:
    """Where requires_grad does not tell that a gradient is wanted: constants are constants there, too."""
    loss, many = loss_of(sample), stacked(doubles(sample, device))
    expected = by_case(loss, sample, many)
    assert_equal(func.grad(lambda *t: func.vmap(loss)(*t).sum(), numbers_of(sample))(*many), expected)
    assert_equal(backward(lambda *t: func.vmap(loss)(*t).sum(), sample, many), expected)


def test_jacrev(device: torch.device, sample: Sample) -> None:
    inputs = doubles(sample, device)
    constants = inputs[sample.differentiable :]

    def first(*wanted: Tensor) -> Tensor:
        return tensors(sample.function(*wanted, *constants))[0]

    wanted = tuple(inputs[: sample.differentiable])
    expected = torch.autograd.functional.jacobian(first, wanted)
    assert_equal(func.jacrev(first, numbers_of(sample))(*wanted), list(expected))


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_vmap(device: torch.device, name: str, grad_mode: bool) -> None:
    sample = SAMPLES[name]
    many = stacked(doubles(sample, device))
    with torch.set_grad_enabled(grad_mode):
        mapped = tensors(func.vmap(lambda *t: tuple(tensors(sample.function(*t))))(*many))
        cases = [tensors(sample.function(*(t[i] for t in many))) for i in range(2)]
    for number, (actual, *expected) in enumerate(zip(mapped, *cases, strict=True)):
        if actual.is_floating_point():  # several images at a time may add up in another order
            assert_within(f"result {number}", actual, torch.stack(expected), EXACT)
        else:
            assert_same(f"result {number}", actual, torch.stack(expected))


def by_jvp(loss: Loss, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    constants = inputs[len(directions) :]
    return func.jvp(lambda *t: loss(*t, *constants), tuple(inputs[: len(directions)]), tuple(directions))[1]


def by_forward_ad(loss: Loss, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, directions, strict=False)]
        tangent = forward_ad.unpack_dual(loss(*duals, *inputs[len(directions) :])).tangent
        return torch.zeros_like(inputs[0]).sum() if tangent is None else tangent.clone()


def in_vmap(loss: Loss, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The outer transform's tangent, which the inner one's tensors do not show."""
    many, along = ([t[None] for t in given] for given in (inputs, directions))
    return by_jvp(lambda *t: func.vmap(loss)(*t).sum(), many, along)


def around_vmap(loss: Loss, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    return func.vmap(lambda *along: by_jvp(loss, inputs, list(along)))(*(d[None] for d in directions)).sum()


FORWARD = (by_jvp, by_forward_ad, in_vmap, around_vmap)


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("forward", FORWARD)
def test_forward_mode_is_right_or_refused(
    device: torch.device, sample: Sample, forward: Callable[..., Tensor], grad_mode: bool
) -> None:
    """Silence would be a zero."""
    loss, inputs = loss_of(sample), doubles(sample, device)
    gradients = backward(loss, sample, inputs)
    directions = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=device).view(t.shape) for t in gradients]
    with torch.set_grad_enabled(grad_mode):
        if sample.name not in FORWARD_MODE:
            with pytest.raises(NotImplementedError, match=REFUSED):
                forward(loss, inputs, directions)
            return
        actual = forward(loss, inputs, directions)
    expected = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    assert expected != 0
    assert_within("derivative", actual, expected, EXACT)


@pytest.mark.parametrize("number", range(4))
def test_a_tangent_of_any_input_is_refused(device: torch.device, number: int) -> None:
    """Each input by itself, the others without one."""
    sample = SAMPLES["masked_attention"]
    inputs = doubles(sample, device)

    def along(one: Tensor) -> Tensor:
        return loss_of(sample)(*inputs[:number], one, *inputs[number + 1 :])

    with pytest.raises(NotImplementedError, match=REFUSED):
        func.jvp(along, (inputs[number],), (inputs[number],))


def test_forward_mode_of_something_else(device: torch.device, sample: Sample) -> None:
    """Operators may run while forward mode differentiates what they have no part in."""
    loss, inputs = loss_of(sample), doubles(sample, device)
    scale = torch.ones((), dtype=torch.float64, device=device)
    value, derivative = func.jvp(lambda scale: scale * loss(*inputs), (scale,), (scale,))
    assert_within("derivative", derivative, loss(*inputs), EXACT)
    assert_within("value", value, loss(*inputs), EXACT)


@pytest.mark.parametrize("name", ["prune_merge", "masked_attention"])
def test_forward_mode_is_refused_when_compiled(device: torch.device, name: str) -> None:
    """Also by what was compiled before, without a tangent in sight."""
    sample = SAMPLES[name]
    loss, inputs = loss_of(sample), doubles(sample, device)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    compiled(*inputs)
    for forward in (by_jvp, by_forward_ad):
        with pytest.raises(NotImplementedError, match=REFUSED):
            forward(compiled, inputs, inputs[: sample.differentiable])
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.compile(forward, backend="aot_eager")(loss, inputs, inputs[: sample.differentiable])


@pytest.fixture
def twice_differentiable_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def second(gradients: Callable[..., tuple[Tensor, ...]]) -> Loss:
    return lambda *t: torch.stack([g.square().sum() for g in gradients(*t)]).sum()


@pytest.mark.usefixtures("twice_differentiable_attention")
def test_second_gradient_is_right_or_refused(device: torch.device, sample: Sample) -> None:
    """Of a gradient's squares, against differences of the gradient along itself."""
    loss, inputs = loss_of(sample), doubles(sample, device)
    numbers = numbers_of(sample)
    plain = second(lambda *t: torch.autograd.grad(loss(*t), t[: len(numbers)], create_graph=True))
    transformed = second(func.grad(loss, numbers))
    if not sample.name.startswith(TWICE):
        for refused in (lambda: func.grad(transformed, numbers)(*inputs), lambda: backward(plain, sample, inputs)):
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                refused()
        return
    step = 1e-5
    along = backward(loss, sample, inputs)

    def shifted(by: float) -> list[Tensor]:
        moved = [t + by * d for t, d in zip(inputs, along, strict=False)]
        return backward(loss, sample, [*moved, *inputs[len(numbers) :]])

    expected = [(up - down) / step for up, down in zip(shifted(step), shifted(-step), strict=True)]
    assert_equal(backward(plain, sample, inputs), expected, 1e-3)
    assert_equal(func.grad(transformed, numbers)(*inputs), expected, 1e-3)


def test_second_gradient_of_fused_attention_raises() -> None:
    sample = SAMPLES["proportional_attention"]
    q, *others = doubles(sample, torch.device("cpu"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="not implemented"):
        func.grad(lambda q: func.grad(loss_of(sample))(q, *others).sum())(q)


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in FORWARD_MODE])
def test_hessian_is_refused(device: torch.device, name: str) -> None:
    """It is forward mode over reverse mode."""
    sample = SAMPLES[name]
    with pytest.raises(NotImplementedError, match=REFUSED):
        func.hessian(loss_of(sample))(*doubles(sample, device))


def test_hessian_in_reverse_mode(device: torch.device) -> None:
    """The same as by plain autograd."""
    x, importance = (t.to(device) for t in (torch.randn(1, 6, 3).double(), torch.rand(1, 6).double()))

    def loss(x: Tensor) -> Tensor:
        return ops.prune_merge(x, importance, 5, 3)[0].pow(3).sum()

    expected = torch.autograd.functional.hessian(loss, x)
    assert expected.abs().sum() > 0
    assert_within("hessian", func.jacrev(func.jacrev(loss))(x), expected, EXACT)
