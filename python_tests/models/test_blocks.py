"""Compressed blocks are modules that are called: what hooks into a block's call works on a compressed model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.metaformer import MetaFormer
from tiny_models import attention_of, blocks_of, tiny_caformer, tiny_images, tiny_schedule, tiny_vit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from two_processes import torchrun

from diffrate_ext import InputTypeError, InputValueError, RateSearch, compress, restore
from diffrate_ext.models.compressed import TokenState

KINDS: dict[str, Callable[[], nn.Module]] = {
    "class token": tiny_vit,
    "mean pool": lambda: tiny_vit(global_pool="avg", class_token=False),
    "CAFormer": tiny_caformer,
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return KINDS[request.param]()


def searching(model: nn.Module) -> RateSearch:
    rates = RateSearch(model, train_weights=True)
    rates.set_schedule(tiny_schedule(model))
    return rates


# --- hooks


@pytest.mark.parametrize("mode", ["compressed", "search, evaluating", "search, training"])
def test_hooks_on_every_block_and_its_attention_fire_once(model: nn.Module, mode: str) -> None:
    caller = compress(model, tiny_schedule(model)) if mode == "compressed" else searching(model)
    caller.train(mode == "search, training")
    calls: dict[str, list[Any]] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.setdefault(name, []).append((inputs[0], output))

        return hook

    names = []
    for i, block in enumerate(blocks_of(model)):
        for name, module in ((f"block {i}", block), (f"attention {i}", attention_of(block))):
            names.append(name)
            module.register_forward_hook(count(name))
    caller(tiny_images(model))
    assert sorted(calls) == sorted(names)
    assert {len(found) for found in calls.values()} == {1}
    for (entered, left), *_ in calls.values():  # tokens in, tokens out: what Grad-CAM and feature extractors take
        assert isinstance(entered, Tensor)
        assert isinstance(left, Tensor)
        assert entered.ndim == left.ndim == 3
    if mode == "compressed":
        kept = [numbers[1] for numbers in tiny_schedule(model).kept_numbers(calls["block 0"][0][0].shape[1])]
        assert [calls[f"block {i}"][0][1].shape[1] for i in range(4)] == kept[:4]


def test_a_hook_may_replace_what_leaves_a_block(model: nn.Module) -> None:
    compress(model, tiny_schedule(model))
    images = tiny_images(model)
    before = model(images)
    handle = blocks_of(model)[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.allclose(model(images), before)
    handle.remove()
    torch.testing.assert_close(model(images), before)


def test_gradients_of_a_block_output(model: nn.Module) -> None:
    """As Grad-CAM takes them."""
    compress(model, tiny_schedule(model))
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    blocks_of(model)[2].register_forward_hook(keep)
    model(tiny_images(model))[:, 1].sum().backward()
    assert found[0].grad is not None
    assert found[0].grad.abs().sum() > 0


# --- wrappers


def wrap_blocks(model: Any) -> None:
    hosts = [stage for stage in model.stages if not stage.use_nchw] if isinstance(model, MetaFormer) else [model]
    for host in hosts:
        for i, block in enumerate(host.blocks):
            host.blocks[i] = checkpoint_wrapper(block)


@pytest.mark.parametrize("first", ["search", "wrappers"])
def test_activation_checkpointing_by_wrappers(model: nn.Module, first: str) -> None:
    images = tiny_images(model)
    gradients = []
    for wraps in (False, True):
        other = copy.deepcopy(model)
        if wraps and first == "wrappers":
            wrap_blocks(other)
        rates = searching(other).train()
        if wraps and first == "search":
            wrap_blocks(other)
        (rates(images).square().sum() + rates.flops_loss(0.0)).backward()
        gradients.append(
            {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in rates.named_parameters()}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_by_themselves(model: nn.Module, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    compress(model.train(), tiny_schedule(model))
    images = tiny_images(model)
    expected = model(images)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for block in blocks_of(model):
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = model(images)
    torch.testing.assert_close(compiled, expected)
    compiled.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_blocks_that_keep_other_numbers_share_their_compiled_code() -> None:
    """Twelve blocks, which timm compiles once: here a few times, far from the limit at which torch gives up."""
    torch._dynamo.reset()
    model = tiny_vit(depth=12, img_size=64)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    kept = [257 - 19 * i for i in range(12)]
    from diffrate_ext import Schedule

    compress(model, Schedule([min(257, n + 7) for n in kept], kept))
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 64))
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        # apart, sums and norms between blocks round otherwise, and twelve blocks make more of it
        torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), expected, atol=1e-3, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_compiles_whole(model: nn.Module, checkpointing: bool) -> None:
    torch._dynamo.reset()
    model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
    compress(model.train(), tiny_schedule(model))
    images = tiny_images(model)
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled, expected)
    compiled.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["compressed", "search"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_give_what_one_gives(how: str, kind: str) -> None:
    done = torchrun(str(Path(__file__).parent / "parallel_training.py"), how, kind)
    assert done.returncode == 0, done.stderr


def test_weights_that_are_offloaded(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    images = tiny_images(model)
    compress(model, tiny_schedule(model))
    with torch.no_grad():
        expected = model(images)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        torch.testing.assert_close(model(images), expected)
    if not isinstance(model, MetaFormer):  # of those the hooks are elsewhere
        with pytest.raises(InputValueError, match=r"the model has a forward of its own.*hooks.*remove them first"):
            restore(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    restore(model)
    assert isinstance(model, MetaFormer) or "forward" not in vars(model)


def test_tokens_follow_a_model_to_another_device() -> None:
    """A model that is spread over devices: the features move between blocks, and what belongs to them follows."""
    state = TokenState(torch.ones(2, 3), torch.ones(2, 3))
    moved = state.on(torch.device("meta"))
    assert (moved.size.device.type, moved.mask.device.type) == ("meta", "meta")  # type: ignore[union-attr]
    assert state.on(torch.device("cpu")) is state
    assert TokenState().on(torch.device("meta")) == TokenState()


# --- what would be bypassed


@pytest.mark.parametrize("part", ["model", "block", "attention"])
def test_a_forward_of_an_instance_is_refused_before_compression(model: nn.Module, part: str) -> None:
    block = blocks_of(model)[1]
    stages = [stage for stage in getattr(model, "stages", []) if not stage.use_nchw]
    target = {"model": (stages or [model])[0], "block": block, "attention": attention_of(block)}[part]
    target.forward = functools.partial(type(target).forward, target)  # as accelerate's hooks do it
    with pytest.raises(InputValueError, match=r"has a forward of its own.*compress the model first"):
        compress(model, tiny_schedule(model))
    with pytest.raises(InputValueError, match="has a forward of its own"):
        RateSearch(model)
    assert "Compressed" not in type(model).__name__
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_forward_of_an_instance_inside_a_block_is_honoured(model: nn.Module) -> None:
    images, mlp = tiny_images(model), blocks_of(model)[1].mlp
    compress(model, tiny_schedule(model))
    before = model(images)
    mlp.forward = lambda x: torch.zeros_like(x)  # type: ignore[union-attr]
    assert not torch.allclose(model(images), before)


def test_a_block_that_came_later_is_not_left_out(model: nn.Module) -> None:
    compress(model, tiny_schedule(model))
    host: Any = next(stage for stage in model.stages if not stage.use_nchw) if isinstance(model, MetaFormer) else model
    host.blocks.append(copy.deepcopy(host.blocks[-1]))
    with pytest.raises(InputValueError, match="the model has 5 blocks, and was compressed with 4"):
        model(tiny_images(model))


def test_a_block_alone_says_who_calls_it(model: nn.Module) -> None:
    compress(model, tiny_schedule(model))
    block: Any = blocks_of(model)[0]
    tokens = torch.randn(1, 16, block.norm1.weight.shape[0])
    for call in (block, attention_of(block)):
        with pytest.raises(InputTypeError, match=r"blocks are called by the model.*not model\.blocks"):
            call(tokens)
