"""What every method of token compression promises."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_cases import load_case
from tiny_models import tiny_caformer, tiny_eva, tiny_images, tiny_predictors, tiny_vit
from torch import Tensor, nn

from diffrate_ext import Schedule, compress, compressed_copy, flops, restore, token_slots, uniform_schedule
from diffrate_ext.errors import InputTypeError, InputValueError
from diffrate_ext.methods import METHODS, DynamicViT, Method, Predictors, ToMe, method_of
from diffrate_ext.models import adapter_for

MODELS: dict[str, Callable[[], nn.Module]] = {
    "class token": tiny_vit,
    "registers": lambda: tiny_vit(reg_tokens=2),
    "class token, mean pool": lambda: tiny_vit(global_pool="avg"),
    "no class token": lambda: tiny_vit(global_pool="avg", class_token=False),
    "rotary": tiny_eva,
    "rotary by block and head": lambda: tiny_eva("rotary by block and head"),
    "CAFormer": tiny_caformer,
}
RUNS = [
    (name, method)
    for name in MODELS
    for method in METHODS
    if name != "CAFormer" or method in ("diffrate", "tome")
    if (name, method) != ("no class token", "evit")
]


def runnable(method: str, model: nn.Module) -> str | Method:
    """The method, with all that it needs for the model."""
    return DynamicViT(tiny_predictors(model)) if method == "dynamicvit" else method


def schedule_for(model: Any, numbers: list[int]) -> Schedule:
    """Of the tokens beside the prefix."""
    prefix = adapter_for(model).rules.prefix
    return Schedule(None, [prefix + number for number in numbers], prefix=prefix)


def weak_schedule(model: nn.Module) -> Schedule:
    """At most half of the patches at a time, as ToMe needs it."""
    return schedule_for(model, [16, 11, 8, 8, 4, 3] if len(adapter_for(model).stages) > 1 else [16, 11, 8, 7])


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}, {run[1]}")
def run(request: pytest.FixtureRequest) -> tuple[nn.Module, str | Method]:
    name, method = request.param
    model = MODELS[name]()
    return model, runnable(method, model)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_the_authors_results(name: str, device: torch.device) -> None:
    case = load_case(f"{name}_a", device)
    tokens = case.model.patch_embed.num_patches + 1  # type: ignore[union-attr,operator]
    left = []
    for block in range(len(case.model.blocks)):  # type: ignore[arg-type]
        if name == "tome":
            tokens -= min(case.meta["r"], (tokens - 1) // 2)
        elif case.meta["keep_rate"][block] < 1:
            tokens = 1 + math.ceil(case.meta["keep_rate"][block] * (tokens - 1)) + 1
        left.append(tokens)
    compress(case.model, Schedule(None, left), method=name)
    with torch.inference_mode():
        torch.testing.assert_close(case.model(case.images), case.arrays["logits"], atol=1e-4, rtol=0)


def test_as_many_tokens_as_the_schedule_says(run: tuple[Any, str | Method]) -> None:
    model, method = run
    schedule = weak_schedule(model)
    slots = token_slots(compress(model, schedule, method=method), tiny_images(model))
    kept = [numbers for part in adapter_for(model).kept_numbers(schedule) for numbers in part]
    assert [int(slot.max()) + 1 for slot in slots] == [after for _, after in kept]
    for slot in slots:
        for image in slot:
            there = image[image >= 0].unique()
            assert there.tolist() == list(range(len(there)))


def test_nothing_removed_changes_nothing(run: tuple[Any, str | Method]) -> None:
    model, method = run
    images = tiny_images(model)
    before = logits_of(model, images)
    everything = [
        part.tokens - adapter_for(model).rules.prefix for part in adapter_for(model).stages for _ in part.blocks
    ]
    compress(model, schedule_for(model, everything), method=method)
    torch.testing.assert_close(logits_of(model, images), before)


def test_compressed_restored_copied_and_pickled(run: tuple[Any, str | Method]) -> None:
    model, method = run
    images = tiny_images(model)
    before = logits_of(model, images)
    copy = compressed_copy(model, weak_schedule(model), method=method)
    compress(model, weak_schedule(model), method=method)
    found = logits_of(model, images)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(logits_of(copy, images), found)
    torch.testing.assert_close(logits_of(pickle.loads(pickle.dumps(model)), images), found)
    torch.testing.assert_close(logits_of(restore(model), images), before)


def test_images_of_another_batch_size(run: tuple[Any, str | Method]) -> None:
    """An image's result does not depend on the others."""
    model, method = run
    if method == "random":
        pytest.skip("which patches go depends on what is drawn for all images")
    compress(model, weak_schedule(model), method=method)
    images = tiny_images(model)
    torch.testing.assert_close(logits_of(model, images[1:2]), logits_of(model, images)[1:2])


def test_gradients_reach_the_weights(run: tuple[Any, str | Method]) -> None:
    model, method = run
    compress(model.train(), weak_schedule(model), method=method)
    model(tiny_images(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
def test_compiles_whole(run: tuple[Any, str | Method]) -> None:
    torch.compiler.reset()
    model, method = run
    compress(model, weak_schedule(model), method=method)
    images = tiny_images(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        if method == "random":
            assert compiled(images).shape == model(images).shape
        else:
            torch.testing.assert_close(compiled(images), model(images))


def test_exports_with_any_batch_size(run: tuple[Any, str | Method]) -> None:
    model, method = run
    compress(model, weak_schedule(model), method=method)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (tiny_images(model),), dynamic_shapes=({0: batch},)).module()
        images = tiny_images(model, 5)
        if method == "random":
            assert exported(images).shape == model(images).shape
        else:
            torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize("method", ["diffrate", "tome", "evit", "dynamicvit"])
def test_under_vmap(method: str) -> None:
    model = tiny_vit()
    compress(model, weak_schedule(model), method=runnable(method, model))
    images = tiny_images(model, 4)
    with torch.no_grad():
        found = torch.func.vmap(model)(images.unflatten(0, (2, 2)))
        torch.testing.assert_close(found.flatten(0, 1), model(images))


@pytest.mark.parametrize("method", ["diffrate", "tome", "evit", "dynamicvit"])
def test_gradients_per_picture(method: str) -> None:
    model = tiny_vit()
    compress(model, weak_schedule(model), method=runnable(method, model))
    images, parameters = tiny_images(model, 3), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, images)
    for number, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()), materialize_grads=True)
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][number], gradient, rtol=1e-4, atol=1e-5)
        assert any(gradient.abs().sum() > 0 for gradient in expected)


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("method", ["diffrate", "tome", "evit", "dynamicvit"])
def test_forward_mode_is_refused(method: str, grad_mode: bool) -> None:
    """Instead of a derivative without what the operators have to say."""
    model = tiny_vit()
    compress(model, weak_schedule(model), method=runnable(method, model))
    images = tiny_images(model, 16)
    refused = pytest.raises(NotImplementedError, match="diffrate_ext's operators have no forward-mode derivative")
    with torch.set_grad_enabled(grad_mode):
        with refused:
            torch.func.jvp(model, (images,), (images,))
        with refused, torch.autograd.forward_ad.dual_level():
            model(torch.autograd.forward_ad.make_dual(images, images))


def test_evit_needs_a_place_for_the_fused_token() -> None:
    model = tiny_vit()
    with pytest.raises(InputValueError, match="one fused token, 2 tokens, or more; the schedule has 1"):
        compress(model, Schedule([17, 10, 10, 1], [17, 10, 10, 1]), method="evit")


def test_random_pruning_can_be_repeated() -> None:
    model = tiny_vit()
    images = tiny_images(model)
    compress(model, weak_schedule(model), method="random")
    first = logits_of(model, images)
    torch.testing.assert_close(logits_of(model, images), first)
    with torch.no_grad():
        assert not torch.allclose(model(images), first)


def test_tome_with_and_without_proportional_attention() -> None:
    model = tiny_vit()
    images, schedule = tiny_images(model), weak_schedule(model)
    plain = logits_of(compressed_copy(model, schedule, method=ToMe(proportional_attention=False)), images)
    proportional = logits_of(compressed_copy(model, schedule, method="tome"), images)
    torch.testing.assert_close(logits_of(compressed_copy(model, schedule, method=ToMe()), images), proportional)
    assert not torch.allclose(plain, proportional)


def test_evit_fuses_what_it_drops() -> None:
    """Left with the class token and the fused one, nothing of the patches is lost but by their attention."""
    model = tiny_vit()
    compress(model, schedule_for(model, [16, 1, 1, 1]), method="evit")
    slots = token_slots(model, tiny_images(model))
    assert slots[1].tolist() == [[0] + 16 * [1]] * 3


@pytest.mark.parametrize("share", [0.5, 0.65, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_uniform_schedules_meet_the_target(share: float, method: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        method_used = runnable(method, model)
    target = share * flops(model) / 1e9
    schedule = uniform_schedule(model, target, method=method_used)
    assert flops(model, schedule) / 1e9 == pytest.approx(target, rel=0.01)
    assert (schedule.after_pruning is not None) == (method == "diffrate")
    kept = schedule.after_merging
    method_of(method_used).check(adapter_for(model), adapter_for(model).kept_numbers(schedule))
    if share == 1:
        assert set(kept) == {197}
    elif method == "tome":
        pairs = list(zip((197, *kept), kept, strict=False))
        removed = [before - after for before, after in pairs if before - after < (before - 1) // 2]
        assert len(removed) >= 11
        assert max(removed) - min(removed) <= 1
    elif method == "evit":
        assert [block for block in range(1, 12) if kept[block] < kept[block - 1]] == [3, 6, 9]
        rates = [(kept[block] - 2) / (kept[block - 1] - 1) for block in (3, 6, 9)]
        assert max(rates) - min(rates) <= 1 / kept[6]


def test_as_tome_with_r_16() -> None:
    """The rule of the paper, for ViT-S: 16 in every block."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    left = [*(197 - 16 * (block + 1) for block in range(11)), 11]  # the last block has 20 patches left
    gflops = flops(model, Schedule(None, left)) / 1e9
    assert uniform_schedule(model, gflops, method="tome").after_merging == tuple(left)


@pytest.mark.parametrize(
    ("make", "numbers", "method", "error", "message"),
    [
        (
            tiny_vit,
            [16, 7, 7, 7],
            "tome",
            InputValueError,
            "block 1 has 17 tokens and keeps at least 9, the schedule says 8",
        ),
        (tiny_caformer, [16, 7, 7, 7, 4, 1], "tome", InputValueError, "keeps 2 tokens or more"),
        (tiny_caformer, [16, 8, 8, 8, 4, 4], "evit", InputValueError, "which this MetaFormer lacks"),
        (tiny_vit, [16, 8, 8, 8], "dynamicvit", InputValueError, "needs predictors that were trained for the model"),
        (tiny_caformer, [16, 8, 8, 8, 4, 4], "dynamicvit", InputValueError, "a MetaFormer is only merged"),
        (tiny_caformer, [16, 8, 8, 8, 4, 4], "random", InputValueError, "a MetaFormer is only merged"),
        (MODELS["no class token"], [16, 8, 8, 8], "evit", InputValueError, "which this VisionTransformer lacks"),
        (
            tiny_vit,
            [16, 8, 8, 8],
            "pitome",
            InputValueError,
            "one of diffrate, tome, evit, dynamicvit, random, got 'pitome'",
        ),
        (tiny_vit, [16, 8, 8, 8], 3, InputTypeError, "method must be a name or a Method, got int"),
        (tiny_vit, [16, 8, 8, 8], ToMe, InputTypeError, "got the class: use ToMe()"),
    ],
)
def test_errors(
    make: Callable[[], nn.Module], numbers: list[int], method: Any, error: type[Exception], message: str
) -> None:
    model = make()
    with pytest.raises(error, match=re.escape(message)):
        compress(model, schedule_for(model, numbers), method=method)
    with pytest.raises(InputValueError, match="not compressed"):
        restore(model)  # it was left as it was
    if "block" not in message and "2 tokens" not in message:
        with pytest.raises(error, match=re.escape(message)):
            uniform_schedule(model, 1.0, method=method)


def test_a_method_of_ones_own() -> None:
    class Nothing(Method):
        name = "nothing"

        def step(self, rules: Any, k_p: int, k_m: int, before: Any) -> Any:
            return METHODS["diffrate"]().step(rules, 17, 17, before)

    model = tiny_vit()
    images = tiny_images(model)
    before = logits_of(model, images)
    torch.testing.assert_close(logits_of(compress(model, weak_schedule(model), method=Nothing()), images), before)


@pytest.mark.parametrize("method", [*(method() for method in METHODS.values()), ToMe(proportional_attention=False)])
def test_a_method_is_told_by_its_text(method: Method) -> None:
    assert method_of(str(method)) == method


def test_options_follow_the_name() -> None:
    assert method_of("tome:proportional_attention=false") == ToMe(proportional_attention=False)
    assert str(ToMe(proportional_attention=False)) == "tome:proportional_attention=false"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome:keys=true", "method 'tome' has the options proportional_attention, got 'keys=true'"),
        ("random:seed=1", "method 'random' has no options, got 'seed=1'"),
        ("tome:proportional_attention=0", "option proportional_attention of method 'tome' is true or false, got '0'"),
        ("tme:proportional_attention=true", "method must be one of diffrate, tome,"),
    ],
)
def test_options_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(InputValueError, match=re.escape(message)):
        method_of(text)


def test_a_schedule_goes_by_its_own_method(run: tuple[Any, str], tmp_path: Path) -> None:
    model, method = run
    target = 0.8 * flops(model) / 1e9
    if method == "evit":  # which keeps more of so few tokens
        target = 0.95 * flops(model) / 1e9
    chosen = runnable(method, model)
    if isinstance(chosen, DynamicViT) and isinstance(chosen.predictors, Predictors):
        chosen.predictors.save(tmp_path / "predictors.safetensors")
        method = f"dynamicvit:predictors={tmp_path / 'predictors.safetensors'}"
    schedule = uniform_schedule(model, target, method=chosen)
    assert schedule.method == method
    schedule.save(tmp_path / "schedule.json")
    images = tiny_images(model)
    loaded = compressed_copy(model, Schedule.load(tmp_path / "schedule.json"))
    assert torch.equal(logits_of(loaded, images), logits_of(compressed_copy(model, schedule, method=chosen), images))
