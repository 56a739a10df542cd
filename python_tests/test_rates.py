"""RateSearch: what the authors' implementation computed, and what it promises for every model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import load_case
from timm.models.deit import VisionTransformerDistilled
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate_ext import RateSearch, Schedule, compress, ops, reference, restore
from diffrate_ext.flops import flops

# --- against the authors' numbers


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("train_weights", [False, True])
@pytest.mark.parametrize("name", ["deit_search_a", "mae_search_a"])
def test_a_search_step_is_the_authors(name: str, train_weights: bool, device: torch.device) -> None:
    case = load_case(name, device)
    arrays, meta = case.arrays, case.meta
    blocks = [index for index in range(meta["cfg"]["depth"]) if arrays[f"prune_logits_{index}"].numel() > 1]
    rates = RateSearch(case.model, meta["granularity"], train_weights)
    assert rates.prune_logits is not None
    proxies = {"prune": rates.prune_logits, "merge": rates.merge_logits}
    with torch.no_grad():
        for kind, logits in proxies.items():
            logits.copy_(torch.stack([arrays[f"{kind}_logits_{index}"] for index in blocks]))

    out = rates.train()(case.images)
    gflops = rates.gflops()
    loss_of_classes = F.cross_entropy(out, arrays["labels"].long())
    loss = loss_of_classes + meta["lam"] * (gflops - meta["target"]) ** 2
    loss.backward()

    assert relative(out, arrays["logits"]) < 1e-4
    assert gflops.item() * 1e9 == pytest.approx(meta["flops"], rel=1e-4)
    assert loss_of_classes.item() == pytest.approx(meta["loss_cls"], rel=1e-4)
    assert loss.item() == pytest.approx(meta["loss"], rel=1e-4)
    golden = Schedule(meta["prune"], meta["merge"])
    assert rates.schedule().steps(rates.n_patches + 1) == golden.steps(rates.n_patches + 1)
    for kind, logits in proxies.items():
        assert logits.grad is not None
        for row, index in enumerate(blocks):
            expected = arrays[f"{kind}_grad_{index}"]
            assert expected.abs().max() > 0
            assert relative(logits.grad[row], expected) < 1e-3, f"{kind}, block {index}"

    weights = case.model.patch_embed.proj.weight, case.model.blocks[1].attn.qkv.weight  # type: ignore[index,union-attr]
    if train_weights:
        assert relative(weights[0].grad[:8], arrays["grad_patch_proj"]) < 1e-3
        assert relative(weights[1].grad[::24], arrays["grad_qkv_1"]) < 1e-3
    else:
        assert all(parameter.grad is None for parameter in case.model.parameters())


# --- for every kind of model

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def vit(cls: type[VisionTransformer] = VisionTransformer, **changes: Any) -> VisionTransformer:
    return cls(**{**TINY, **changes})


def caformer() -> MetaFormer:
    model = MetaFormer(
        num_classes=5,
        depths=(1, 1, 4, 1),
        dims=(8, 16, 32, 64),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    )
    model.pretrained_cfg = {"input_size": (3, 64, 64)}  # type: ignore[assignment]
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "class token": vit,
    "registers": lambda: vit(reg_tokens=3),
    "layer scale": lambda: vit(init_values=0.3),
    "q/k norm": lambda: vit(qk_norm=True),
    "any image size": lambda: vit(dynamic_img_size=True),
    "distilled": lambda: vit(VisionTransformerDistilled),
    "mean pool": lambda: vit(global_pool="avg"),
    "mean pool over the prefix too": lambda: vit(global_pool="avg", pool_include_prefix=True),
    "no class token": lambda: vit(global_pool="avg", class_token=False),
    "only registers": lambda: vit(global_pool="avg", class_token=False, reg_tokens=2),
    "attention pool": lambda: vit(global_pool="map", class_token=False),
    "attention pool with class token": lambda: vit(global_pool="map"),
    "max pool": lambda: vit(global_pool="max"),
    "mean and max pool": lambda: vit(global_pool="avgmax", class_token=False),
    "CAFormer": caformer,
}


def build(kind: str = "class token") -> nn.Module:
    """A tiny model with 16 patches, whose weights are of such a size that attention is far from uniform."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def images_for(model: nn.Module, count: int = 3) -> Tensor:
    side = 64 if isinstance(model, MetaFormer) else 16
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def searching(model: nn.Module, merging: bool = True, granularity: int = 1, **options: Any) -> RateSearch:
    """A search, not at its beginning: every block prunes some, and merges some more of what is left."""
    rates = RateSearch(model, granularity, **options)
    candidates = torch.arange(rates.n_patches, 0, -granularity)
    with torch.no_grad():
        for logits, first in ((rates.prune_logits, 13.5), (rates.merge_logits, 12.0)):
            if logits is None:
                continue
            for row in range(len(logits)):
                patches = first - 3.5 * row if logits is rates.prune_logits or merging else 16
                logits[row] = -(candidates - patches).abs()
    return rates


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % 5)


def proxies_of(rates: RateSearch) -> list[nn.Parameter]:
    return [logits for logits in (rates.prune_logits, rates.merge_logits) if logits is not None]


def pools_over_patches(model: Any) -> bool:
    return isinstance(model, MetaFormer) or model.global_pool != "token"


def test_the_loss_reaches_every_rate(model: nn.Module) -> None:
    rates = searching(model).train()
    steps = [number for step in rates.schedule().steps(rates.n_patches + rates.prefix)[:4] for number in step]
    compressing = 2 * rates.merge_logits.shape[0]
    assert len(set(steps)) == compressing + 1 - (rates.prune_logits is None) * compressing // 2  # every number falls
    loss_of(rates(images_for(model))).backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        # after the last attention nobody looks at what is masked, unless the head does
        matter = len(logits) if pools_over_patches(model) else len(logits) - 1
        assert (logits.grad[:matter].abs().sum(1) > 1e-8).all()
        assert (logits.grad[matter:] == 0).all()
    assert [name for name, parameter in rates.named_parameters() if parameter.grad is not None] == [
        name for name, _ in rates.named_parameters(recurse=False)
    ]


def test_the_reference_operators_take_the_same_step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, those of the weights too, in float64."""
    rates, images = searching(model.double(), train_weights=True).double().train(), images_for(model).double()
    steps = []
    for implementation in (ops, reference):
        for name in ("masked_attention", "compression_rate", "masked_prune_merge"):
            monkeypatch.setattr(ops, name, getattr(implementation, name))
        rates.zero_grad()
        loss = loss_of(rates(images)) + rates.gflops()
        loss.backward()
        steps.append({"loss": loss.detach(), **{name: p.grad for name, p in rates.named_parameters()}})
    for name, expected in steps[1].items():
        torch.testing.assert_close(steps[0][name], expected, msg=lambda message, name=name: f"{name}: {message}")


def test_pruning_in_training_is_pruning_at_inference(model: nn.Module) -> None:
    """Masked tokens are as if dropped. (Merging differs: the paper's two modes count sizes differently.)"""
    rates = searching(model.double(), merging=isinstance(model, MetaFormer)).double()
    images = images_for(model).double()
    with torch.no_grad():
        masked, dropped = rates.train()(images), rates.eval()(images)
        with rates.uncompressed() as plain:
            before = plain(images)
    torch.testing.assert_close(masked, dropped, atol=1e-4, rtol=1e-3)
    assert (dropped - before).abs().max() > 1e-2  # something was lost


def test_training_without_gradients_gives_the_same(model: nn.Module) -> None:
    rates, images = searching(model).train(), images_for(model)
    with torch.no_grad():
        expected = rates(images)
    torch.testing.assert_close(rates(images).detach(), expected, atol=1e-4, rtol=1e-4)


def test_evaluation_is_compression_at_the_current_rates(model: nn.Module) -> None:
    images, other = images_for(model), copy.deepcopy(model)
    plain = model(images)
    rates = searching(model).eval()
    out = rates(images)
    torch.testing.assert_close(out, compress(other, rates.schedule())(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, model(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, plain)
    for logits in proxies_of(rates):
        nn.init.zeros_(logits)
    torch.testing.assert_close(rates(images), compress(other, rates.schedule())(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [1, 3, 5, 16, 40])
def test_gflops_are_those_of_the_schedule(model: nn.Module, granularity: int) -> None:
    rates = RateSearch(model, granularity)
    random = torch.Generator().manual_seed(granularity)
    for _ in range(5):
        for logits in proxies_of(rates):
            logits.data = 3 * torch.randn(logits.shape, generator=random)
        gflops = rates.gflops()
        assert gflops.item() == pytest.approx(rates.schedule().gflops(model), rel=1e-6)
        assert gflops.dtype == torch.float32
    for gradient in torch.autograd.grad(gflops, proxies_of(rates)):
        assert gradient.isfinite().all()
        assert (gradient.abs().sum() > 0) == (granularity < 16)  # one candidate leaves no choice
    assert rates.schedule().model == Schedule.uniform(model, flops(model) / 1e9).model


def test_every_rate_pays_for_its_tokens(model: nn.Module) -> None:
    """The gradient of the FLOPs goes to the kept numbers of a block alike, also where another one is smaller."""
    rates = searching(model)
    gradients = torch.autograd.grad(rates.gflops(), proxies_of(rates))
    for logits, gradient in zip(proxies_of(rates), gradients, strict=True):
        p = logits.softmax(-1).detach()
        candidates = torch.arange(rates.n_patches, 0, -1.0)
        mean = (p * candidates).sum(-1, keepdim=True)
        per_token = gradient / (p * (candidates - mean))  # d kept / d logits, without the rounding
        torch.testing.assert_close(per_token, per_token[:, :1].expand_as(per_token), rtol=1e-3, atol=0)
        assert (per_token > 0).all()
    if len(gradients) == 2:
        prune, merge = (
            (gradient[:, 0] / (logits.softmax(-1)[:, 0] * (16 - (logits.softmax(-1) * candidates).sum(-1))))
            for logits, gradient in zip(proxies_of(rates), gradients, strict=True)
        )
        torch.testing.assert_close(prune, merge, rtol=1e-3, atol=0)


def test_a_search_for_flops_alone_finds_them(model: nn.Module) -> None:
    rates = RateSearch(model)
    low, high = rates.reachable_gflops()
    target = low + 0.6 * (high - low)
    optimizer = torch.optim.Adam(proxies_of(rates), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        ((rates.gflops() - target) / high).square().backward()
        optimizer.step()
    assert abs(rates.gflops().item() - target) < 0.06 * high


def test_projection_meets_the_target(model: nn.Module) -> None:
    rates = searching(model)
    low, high = rates.reachable_gflops()
    assert high == pytest.approx(flops(model) / 1e9)
    one_token = (high - low) / rates.n_patches  # more than a token more in one block costs
    for part in (0.0, 0.1, 0.5, 0.9, 1.0):
        target = low + part * (high - low)
        rates.project(target)
        assert rates.schedule().gflops(model) == pytest.approx(target, abs=one_token)
    for target in (0.99 * low, 1.01 * high):
        with pytest.raises(ValueError, match="GFLOPs cannot be reached"):
            rates.project(target)


def test_a_schedule_to_search_from(model: nn.Module) -> None:
    schedule = Schedule.uniform(model, 0.85 * flops(model) / 1e9)
    rates = RateSearch(model)
    rates.set_schedule(schedule)
    # a proxy that keeps as many as another, or all, has no say in the running minimum
    assert rates.schedule().merge[:4] == schedule.merge[:4]
    assert rates.schedule().gflops(model) == pytest.approx(schedule.gflops(model))
    keep_all = Schedule(None, [rates.prefix + 16] * len(schedule), prefix=rates.prefix)
    if not isinstance(model, MetaFormer):
        rates.set_schedule(keep_all)
        assert set(rates.schedule().merge) == {rates.prefix + 16}
    with pytest.raises(ValueError, match="blocks, the model"):
        rates.set_schedule(Schedule(None, [9] * 9, prefix=rates.prefix))


@pytest.mark.parametrize("granularity", [2, 7])
def test_granularity_leaves_fewer_candidates(granularity: int) -> None:
    rates = searching(build(), granularity=granularity)
    candidates = list(range(16, 0, -granularity))
    assert rates.merge_logits.shape == (3, len(candidates))
    for logits in proxies_of(rates):
        nn.init.constant_(logits, -1e4)
        logits.data[:, 1] = 0
    assert list(rates.schedule().merge) == [17, *[candidates[1] + 1] * 3]
    loss_of(rates.train()(images_for(rates.model))).backward()


def test_which_blocks_have_rates(model: nn.Module) -> None:
    rates = RateSearch(model)
    assert rates.merge_logits.shape == (2 if pools_over_patches(model) else 3, 16)
    assert (rates.prune_logits is None) == isinstance(model, MetaFormer)
    assert all(torch.equal(logits, torch.zeros_like(logits)) for logits in proxies_of(rates))
    schedule, tokens = rates.schedule(), rates.prefix + 16
    assert schedule.merge[0] == tokens
    assert schedule.merge[1] == rates.prefix + 9  # the mean of 1 .. 16, rounded up
    assert schedule.prefix == rates.prefix
    assert schedule.grid == (4, 4)


def test_something_is_left_to_merge_into(model: nn.Module) -> None:
    """A CAFormer block takes two tokens: the first one takes no other in."""
    rates = RateSearch(model)
    for logits in proxies_of(rates):
        nn.init.constant_(logits, -1e4)
        logits.data[:, -1] = 0
    fewest = max(rates.prefix + 1, 2 if isinstance(model, MetaFormer) else 1)
    assert set(rates.schedule().merge[1:3]) == {fewest}
    images = images_for(model)
    assert rates.train()(images).isfinite().all()
    assert rates.eval()(images).isfinite().all()


# --- what is left of the model


def test_restore_gives_back_the_model_as_it_was(model: nn.Module) -> None:
    images = images_for(model)
    before, keys = model(images), list(model.state_dict())
    next(model.parameters()).requires_grad_(False)  # as its owner wanted it
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    attributes, types = [dict(vars(m)) for m in model.modules()], [type(m) for m in model.modules()]
    rates = searching(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model, types[0])
    rates.train()(images)
    model.eval()
    assert restore(model) is model
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert [type(m) for m in model.modules()] == types
    assert [vars(m) for m in model.modules()] == attributes


def test_weights_train_where_asked(model: nn.Module) -> None:
    first = next(model.parameters()).requires_grad_(False)
    rates = searching(model, train_weights=True).train()
    loss_of(rates(images_for(model))).backward()
    assert first.grad is None
    without = [name for name, p in model.named_parameters() if p is not first and p.grad is None]
    assert without == [name for name in without if name.startswith("head_dist")]
    restore(model)
    assert not first.requires_grad


def test_compressing_ends_the_search(model: nn.Module) -> None:
    images, other = images_for(model), copy.deepcopy(model)
    rates = searching(model)
    schedule = rates.schedule()
    compress(model, schedule)
    assert all(parameter.requires_grad for parameter in model.parameters())
    compress(other, schedule)
    for training in (False, True):
        assert torch.equal(model.train(training)(images), other.train(training)(images))
    restore(model)
    with pytest.raises(ValueError, match="the model is not compressed"):
        restore(model)


def test_a_search_on_a_compressed_model_begins_anew(model: nn.Module) -> None:
    images = images_for(model)
    before = model(images)
    first = searching(model)
    compress(model, first.schedule())
    second = searching(model)
    third = RateSearch(model)
    assert len(third.state_dict()) == len(second.state_dict())
    loss_of(third.train()(images)).backward()
    assert third.merge_logits.grad is not None
    assert second.merge_logits.grad is None
    restore(model.eval())
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_uncompressed_for_a_while(model: nn.Module, training: bool) -> None:
    images = images_for(model)
    before, cls = model(images), type(model)
    rates = searching(model).train(training)
    during = rates(images)
    with rates.uncompressed() as plain:
        assert plain is model
        assert type(plain) is cls
        assert not plain.training
        torch.testing.assert_close(plain(images), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError), rates.uncompressed():
        raise KeyError
    assert model.training == training
    torch.testing.assert_close(rates(images), during, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(during, before)


def test_weights_and_rates_go_both_ways(model: nn.Module) -> None:
    images, keys, other = images_for(model), list(model.state_dict()), copy.deepcopy(model)
    nn.init.ones_(next(other.parameters()))
    rates = searching(model).eval()
    assert list(rates.state_dict()) == [
        *(name for name, _ in rates.named_parameters(recurse=False)),
        *(f"model.{key}" for key in keys),
    ]
    again = RateSearch(other).eval()
    again.load_state_dict(rates.state_dict())
    assert again.schedule() == rates.schedule()
    assert torch.equal(again(images), rates(images))


def pickled(rates: RateSearch) -> RateSearch:
    return pickle.loads(pickle.dumps(rates))


def saved_and_loaded(rates: RateSearch) -> RateSearch:
    file = io.BytesIO()
    torch.save(rates, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
def test_copies(model: nn.Module, copied: Callable[[RateSearch], RateSearch]) -> None:
    images = images_for(model)
    before = model(images)
    rates = searching(model)
    other = copied(rates)
    for training in (False, True):
        assert torch.equal(rates.train(training)(images), other.train(training)(images))
    loss_of(other(images)).backward()
    assert rates.merge_logits.grad is None
    assert other.merge_logits.grad is not None
    nn.init.zeros_(other.merge_logits)
    assert other.schedule() != rates.schedule()
    restore(other.model.eval())
    assert torch.equal(other.model(images), before)
    assert all(parameter.requires_grad for parameter in other.model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.allclose(rates.eval()(images), before)


def test_a_copy_of_the_model_alone_searches_by_itself(model: nn.Module) -> None:
    images = images_for(model)
    rates = searching(model).train()
    other = copy.deepcopy(model)
    loss_of(other(images)).backward()
    assert rates.merge_logits.grad is None
    nn.init.zeros_(rates.merge_logits)
    assert not torch.equal(model.eval()(images), other.eval()(images))


# --- how it runs


def test_checkpointing_changes_no_gradient(model: nn.Module) -> None:
    gradients = []
    for checkpointing in (False, True):
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        rates = searching(other, train_weights=True).train()
        loss = loss_of(rates(images_for(model))) + rates.gflops()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in rates.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_mixed_precision(model: nn.Module) -> None:
    rates = searching(model).train()
    schedule, gflops = rates.schedule(), rates.gflops().item()
    with torch.autocast("cpu", torch.bfloat16):
        logits = rates(images_for(model))
        loss = loss_of(logits) + rates.gflops()
        assert rates.schedule() == schedule
        assert rates.gflops().item() == gflops
    loss.backward()
    for logits in proxies_of(rates):
        assert logits.grad is not None
        assert logits.grad.dtype == torch.float32
        assert logits.grad.isfinite().all()
        assert (logits.grad.abs().sum(1) > 0).all()
    assert rates.schedule() == schedule


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "any image size"])  # timm needs an image there
def test_few_images(kind: str, training: bool, count: int) -> None:
    model = build(kind)
    assert searching(model).train(training)(images_for(model, count)).shape == (count, 5)


def test_images_do_not_depend_on_each_other(model: nn.Module) -> None:
    rates, images = searching(model).train(), images_for(model)
    torch.testing.assert_close(rates(images)[1:2], rates(images[1:2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "side", "tokens"), [("any image size", 24, (17, 37)), ("CAFormer", 96, (16, 36))])
def test_training_needs_images_of_the_models_size(kind: str, side: int, tokens: tuple[int, int]) -> None:
    images = torch.randn(2, 3, side, side)
    rates = searching(build(kind)).train()
    with pytest.raises(
        ValueError, match=rf"images of the model's own size and no patch dropout: {tokens[0]} tokens, got {tokens[1]}"
    ):
        rates(images)
    assert rates.eval()(images).shape == (2, 5)  # compression scales


def test_the_search_step_has_no_intermediate_features() -> None:
    model: Any = build()
    searching(model).train()
    with pytest.raises(ValueError, match="the search step has no intermediate features"):
        model.forward_intermediates(images_for(model))
    model.eval()
    assert len(model.forward_intermediates(images_for(model), intermediates_only=True)) == 4


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, {"granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
        ({}, {"granularity": -2}, ValueError, "granularity must be at least 1, got -2"),
        ({}, {"granularity": 1.0}, TypeError, "granularity must be an int, got float"),
        ({}, {"granularity": True}, TypeError, "granularity must be an int, got bool"),
        ({}, {"granularity": "1"}, TypeError, "granularity must be an int, got str"),
        ({"depth": 1}, {}, ValueError, "no block to compress"),
        ({"depth": 2, "global_pool": "avg"}, {}, ValueError, "no block to compress"),
        ({"global_pool": "prr"}, {}, ValueError, "global_pool='prr' is not supported"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    changes: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = vit(**changes)
    with pytest.raises(error, match=message):
        RateSearch(model, **arguments)
    assert type(model) is VisionTransformer
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_no_model_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is not supported"):
        RateSearch(nn.Linear(2, 2))
