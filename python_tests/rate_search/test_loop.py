"""The search loop: its loss, its steps, its end, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tiny_search import CLASSES, gflops_of, plain_model, quick, tiny_batches, tiny_model
from torch.utils.data import DataLoader, TensorDataset

import diffrate_ext
from diffrate_ext.compression.flops import flops
from diffrate_ext.compression.uniform import uniform_schedule
from diffrate_ext.models.classes import CompressedModule
from diffrate_ext.rate_search.history import SearchHistory
from diffrate_ext.rate_search.loop import search
from diffrate_ext.rate_search.rates import RateSearch
from diffrate_ext.rate_search.settings import LR_CAP, SearchSettings
from diffrate_ext.schedule import Schedule
from diffrate_ext.training.files import replacing
from diffrate_ext.training.records import MOST_RECORDS


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_target_is_met(share, pool):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=2, in_chans=1, embed_dim=16, depth=12, num_heads=2, num_classes=5, global_pool=pool
    )
    images = torch.randn(2, 1, 28, 28)
    settings = SearchSettings(steps=4, lr=0.5)
    result = search(model, [(images, torch.tensor([0, 3]))], gflops_of(model, share), settings)
    assert flops(model, result.schedule) / 1e9 == pytest.approx(gflops_of(model, share), rel=0.01)
    assert result.gflops == flops(model, result.schedule) / 1e9


def test_the_search_itself_nears_the_target():
    model = plain_model()
    for share in (0.5, 0.8):
        records = []
        quick(
            model,
            tiny_batches(),
            share,
            settings=SearchSettings(steps=40, start="zeros", flops_loss="relative"),
            report=records.append,
        )
        missing = [abs(record.cost - gflops_of(model, share)) / gflops_of(model, 1) for record in records]
        assert missing[-1] < 0.1 < missing[0] + 0.1
        assert missing[-1] < missing[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_is(training, compressed, fails):
    model = tiny_model().train(training)
    model.head.requires_grad_(False)
    if compressed:
        diffrate_ext.compress(model, Schedule(after_pruning=[65, 60, 50, 40], after_merging=[65, 55, 45, 35]))
    before = copy.deepcopy(model)
    images = tiny_batches()[0][0]
    if fails:
        with pytest.raises(TypeError, match="batch"):
            quick(model, ["no batch"])
    else:
        quick(model, tiny_batches())
    assert type(model) is type(before)
    assert isinstance(model, CompressedModule) == compressed
    assert model.training == training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])
    assert torch.equal(model.eval()(images), before.eval()(images))


def test_random_numbers_outside_are_not_touched():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    quick(tiny_model_without_seeding(), tiny_batches())
    assert torch.equal(torch.rand(3), expected)


def tiny_model_without_seeding():
    with torch.random.fork_rng():
        return tiny_model()


def test_no_gpu_is_reseeded_but_the_models_own(monkeypatch):
    """``torch.manual_seed`` and ``torch.cuda.manual_seed_all`` reach all GPUs, whose generators nobody saved."""
    model = plain_model()
    for module, name in ((torch, "manual_seed"), (torch.cuda, "manual_seed_all")):
        monkeypatch.setattr(module, name, lambda seed, name=name: pytest.fail(f"{name} was called"))
    quick(model, tiny_batches())


def test_the_same_twice():
    loader = DataLoader(
        TensorDataset(*(torch.cat(parts) for parts in zip(*tiny_batches(), strict=True))), 4, shuffle=True
    )
    first, second = (quick(tiny_model(), loader).history for _ in range(2))
    assert first == second
    other = quick(
        tiny_model(), loader, settings=SearchSettings(steps=3, lr=0.3, start="zeros", flops_loss="relative", seed=1)
    ).history
    assert other.records != first.records


# --- loss


def test_first_record():
    model = plain_model()
    batch = tiny_batches()[0]
    settings = SearchSettings(steps=3, lr=0.3, start="zeros", flops_loss="relative")
    record = quick(model, [batch], settings=settings).history.records[0]
    rates = RateSearch(copy.deepcopy(model)).train()
    logits = rates(batch[0])
    assert record.step == 0
    assert record.loss == pytest.approx(F.cross_entropy(logits, batch[1]).item(), rel=1e-6)
    assert record.accuracy == (logits.argmax(1) == batch[1]).float().mean().item()
    assert record.cost == pytest.approx(rates.gflops().item(), rel=1e-6)
    schedule = rates.schedule()
    assert (record.after_pruning, record.after_merging) == (schedule.after_pruning, schedule.after_merging)
    assert record.lr == pytest.approx(0.3)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_flops_losses(share):
    model, batches = plain_model(), tiny_batches()
    missing = None
    for kind, weight in (("relative", 5.0), ("absolute", 5.0), ("relative", 2.0), ("absolute", 0.0)):
        settings = SearchSettings(steps=2, lr=0.1, flops_loss=kind, flops_weight=weight)
        record = quick(model, batches, share, settings=settings).history.records[0]
        missing = record.cost - gflops_of(model, share)
        if kind == "relative":
            expected = 106 * weight / 5 * (missing / gflops_of(model, 1)) ** 2
        else:
            expected = weight * missing**2
        assert record.flops_loss == pytest.approx(expected, rel=1e-4)
    assert missing is not None
    assert missing != 0


def test_flops_losses_are_equal_on_deit_s():
    uncompressed = 4.6
    relative = 106 / uncompressed**2
    assert relative == pytest.approx(5, rel=0.01)


def test_the_flops_loss_reaches_the_rates():
    """A model that answers without looking at the tokens leaves the FLOPs alone to move the rates."""
    model = plain_model()
    torch.nn.init.zeros_(model.head.weight)
    for share, grows in ((0.95, True), (0.45, False)):
        records = []
        quick(
            model,
            tiny_batches(),
            share,
            settings=SearchSettings(steps=8, lr=0.3, start="zeros", flops_loss="relative"),
            report=records.append,
        )
        assert (records[-1].cost > records[0].cost) == grows


def test_warm_up_goes_without_the_flops_loss():
    settings = SearchSettings(steps=4, lr=0.3, flops_loss="relative", warmup_steps=2)
    records = quick(plain_model(), tiny_batches(), 0.9, settings=settings).history.records
    assert [record.flops_loss > 0 for record in records] == [False, False, True, True]


def test_probabilities_as_labels():
    model, batches = plain_model(), tiny_batches()
    hard = quick(model, batches).history
    one_hot = [(images, F.one_hot(labels, CLASSES).float()) for images, labels in batches]
    soft = quick(model, one_hot).history
    for there, here in zip(soft.records, hard.records, strict=True):
        assert there.loss == pytest.approx(here.loss, rel=1e-5)
        assert there.accuracy == here.accuracy
    smoothed = quick(model, [(images, 0.9 * labels + 0.1 / CLASSES) for images, labels in one_hot]).history.records[0]
    rates = RateSearch(copy.deepcopy(model)).train()
    expected = F.cross_entropy(rates(batches[0][0]), batches[0][1], label_smoothing=0.1).item()
    assert smoothed.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_soft_targets(labelled):
    model = plain_model()
    images, labels = tiny_batches()[0]
    settings = SearchSettings(steps=2, lr=0.1, soft_targets=True, start="zeros", flops_loss="relative")
    record = quick(model, [(images, labels) if labelled else images], settings=settings).history.records[0]
    teacher = model(images).softmax(1)
    logits = RateSearch(copy.deepcopy(model)).train()(images)
    assert record.loss == pytest.approx(F.cross_entropy(logits, teacher).item(), rel=1e-5)
    truth = labels if labelled else teacher.argmax(1)
    assert record.accuracy == (logits.argmax(1) == truth).float().mean().item()


def test_mixed_precision():
    model, batches = plain_model(), tiny_batches()
    whole = quick(model, batches).history.records[0]
    mixed = quick(
        model, batches, settings=SearchSettings(steps=3, lr=0.3, start="zeros", flops_loss="relative", amp=True)
    ).history.records[0]
    assert mixed.loss == pytest.approx(whole.loss, rel=0.05)
    assert mixed.loss != whole.loss
    assert mixed.cost == whole.cost


# --- settings


def test_learning_rates_follow_a_cosine():
    settings = SearchSettings(steps=17, lr=0.4, min_lr=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=0.1)
    for step in range(17):
        assert settings.lr_at(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("steps", [250, 3750])
def test_default_learning_rates_sum_to_20(steps):
    settings = SearchSettings(steps=steps)
    assert sum(settings.lr_at(step) for step in range(steps)) == pytest.approx(20, rel=0.01)
    assert settings.last_lr == settings.first_lr / 10


def test_the_default_learning_rate_is_capped():
    assert SearchSettings(steps=10).first_lr == LR_CAP
    assert SearchSettings(steps=10, lr=2 * LR_CAP).first_lr == 2 * LR_CAP


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps"),
        ({"granularity": 0}, "granularity"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"lr": math.nan}, "lr"),
        ({"flops_weight": math.inf}, "flops_weight"),
        ({"flops_weight": 5.0}, "there is none: choose flops_loss='relative' or 'absolute'"),
        ({"warmup_steps": 1}, "there is none"),
        ({"mask_gradient": "slope"}, "'difference' or 'derivative', got 'slope'"),
        ({"lr": 0.1, "min_lr": 0.2}, "min_lr must not be above lr, got 0.2 and 0.1"),
        ({"flops_loss": "cubic"}, "'none', 'relative' or 'absolute', got 'cubic'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchSettings(**settings)


def test_weight_decay_shrinks_the_logits(tmp_path):
    model, sums = plain_model(), []
    for decay in (0.0, 2.0):
        folder = tmp_path / str(decay)
        quick(model, tiny_batches(), settings=SearchSettings(steps=8, lr=0.3, weight_decay=decay), output=folder)
        logits = torch.load(folder / "checkpoint.pt", weights_only=True)["logits"]
        sums.append(sum(values.abs().sum().item() for values in logits.values()))
    assert sums[1] < 0.9 * sums[0]


def test_granularity(tmp_path):
    settings = SearchSettings(steps=3, lr=0.3, granularity=8)
    quick(plain_model(), tiny_batches(), settings=settings, output=tmp_path)
    logits = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["logits"]
    assert {values.shape for values in logits.values()} == {(3, 8)}


# --- loader


def test_a_loader_is_iterated_again_and_again():
    batches = tiny_batches(3)
    seen = []

    class Loader:
        def __iter__(self):
            for i, batch in enumerate(batches):
                seen.append(i)
                yield batch

    quick(plain_model(), Loader(), settings=SearchSettings(steps=7, lr=0.1))
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_a_loader_made_for_the_steps_from_one_on(tmp_path):
    asked, batches = [], tiny_batches(8)

    def loader(start):
        asked.append(start)
        yield from batches[start:][:3]

    settings = SearchSettings(steps=8, lr=0.1)

    def interrupt(record):
        if record.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(plain_model(), loader, settings=settings, output=tmp_path / "a", report=interrupt)
    assert asked == [0, 3]
    resumed = quick(plain_model(), loader, settings=settings, output=tmp_path / "a", resume=True)
    assert asked == [0, 3, 4, 7]
    assert resumed.history == quick(plain_model(), batches, settings=settings).history


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "the loader gave no images"),
        (iter(tiny_batches(2)), ValueError, "no images, iterated again after 2 batches"),
        ([tiny_batches()[0][0]], ValueError, "without labels.*soft_targets=True"),
        ([(tiny_batches()[0][0], torch.tensor([0, 1, 2, CLASSES]))], ValueError, rf"0 \.\. {CLASSES - 1}"),
        ([(tiny_batches()[0][0], torch.zeros(4, CLASSES + 1))], ValueError, rf"\(4, {CLASSES}\).*\(4, {CLASSES + 1}\)"),
        ([(tiny_batches()[0][0], torch.zeros(3, dtype=torch.long))], ValueError, r"\(4,\)"),
        ([(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))], (ValueError, AssertionError), "64|size"),
        (["no batch"], TypeError, "a batch of the loader must be"),
    ],
)
def test_bad_loaders(loader, error, message, tmp_path):
    with pytest.raises(error, match=message):
        quick(plain_model(), loader, output=tmp_path / "search")


def test_the_schedule_is_evaluated_where_there_are_images_for_it():
    model, validation = plain_model(), tiny_batches(2, seed=9)
    assert quick(model, tiny_batches()).evaluation is None
    result = quick(model, tiny_batches(), validation=validation)
    compressed = diffrate_ext.compressed_copy(model, result.schedule)
    assert result.evaluation == diffrate_ext.evaluate(compressed, validation, reference=model)
    assert result.evaluation.n == 8


def test_report_is_called_after_every_step():
    records = []
    quick(plain_model(), tiny_batches(), settings=SearchSettings(steps=5, lr=0.1), report=records.append)
    assert [record.step for record in records] == [0, 1, 2, 3, 4]


# --- what cannot be searched for


@pytest.mark.parametrize("share", [0.01, 1.01])
def test_a_target_out_of_reach(share, tmp_path):
    model, touched = plain_model(), []
    least, most = RateSearch(copy.deepcopy(model)).reachable()
    with pytest.raises(ValueError, match="cannot be reached") as error:
        quick(model, lambda start: touched.append(start), share, output=tmp_path / "search")
    assert f"{most:.4g} uncompressed" in str(error.value)
    assert f"{least:.4g} with all" in str(error.value)
    assert not touched
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize("share", [-1.0, math.nan])
def test_a_target_that_is_no_amount(share):
    with pytest.raises(ValueError, match="gflops must be positive and finite"):
        quick(plain_model(), tiny_batches(), share)


def test_the_whole_model_as_target():
    model = plain_model()
    result = search(model, tiny_batches(), gflops_of(model, 1), SearchSettings(steps=2, lr=0.1))
    assert set(result.schedule.after_merging) == {65}


def test_an_unsupported_model():
    with pytest.raises(TypeError, match="Linear"):
        search(torch.nn.Linear(2, 2), [], 1.0)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_divergence_keeps_the_state_before(part, tmp_path, monkeypatch):
    batches = tiny_batches(4)
    if part == "loss":
        batches[2] = (batches[2][0] * math.nan, batches[2][1])
    else:
        gflops, calls = RateSearch.cost, []

        def poisoned(self):
            result = gflops(self)
            calls.append(None)
            if len(calls) == 3:
                result.register_hook(lambda gradient: gradient * math.nan)
            return result

        monkeypatch.setattr(RateSearch, "cost", poisoned)
    with pytest.raises(FloatingPointError, match="step 2: the loss or its gradient is not finite") as error:
        quick(plain_model(), batches, settings=SearchSettings(steps=4, lr=0.1), output=tmp_path)
    assert ("classification nan" in str(error.value)) == (part == "loss")
    assert str(tmp_path / "checkpoint.pt") in str(error.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(logits.isfinite().all() for logits in state["logits"].values())


def test_what_diverges_at_once_leaves_nothing_and_says_nothing_else(tmp_path):
    images, labels = tiny_batches()[0]
    with pytest.raises(diffrate_ext.DivergedError, match=r"step 0: .*do the images or the weights hold NaN\?$"):
        quick(plain_model(), [(images * math.nan, labels)], output=tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- files


def test_files(tmp_path):
    model = plain_model()
    folder = tmp_path / "new" / "search"
    result = quick(model, tiny_batches(), output=folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "history.json", "schedule.json", "search.png"}
    assert Schedule.load(folder / "schedule.json") == result.schedule
    diffrate_ext.compress(model, result.schedule)
    history = json.loads((folder / "history.json").read_text())
    assert history["target_gflops"] == gflops_of(model, 0.6)
    assert history["uncompressed_tokens_of_each_block"] == [65] * 4
    assert [record["step"] for record in history["records"]] == [0, 1, 2]
    assert history["records"][1]["tokens_after_merging"] == list(result.history.records[1].after_merging)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def write(text, fail):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert path.read_text() == "before"
            if fail:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        write("half", True)
    assert path.read_text() == "before"
    write("after", False)
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", ["", "part"])
def test_an_output_that_is_a_file(existing, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        quick(plain_model(), tiny_batches(), output=tmp_path / "file" / existing)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("steps", [1, 2, 499, 500, 501, 1000, 3750])
def test_histories_are_bounded_and_hold_the_ends(steps):
    history = SearchHistory(1.0, 2.0, steps, (65,))
    recorded = [step for step in range(steps) if history.wants(step)]
    assert min(steps, MOST_RECORDS // 2) <= len(recorded) <= MOST_RECORDS + 1
    assert recorded[0] == 0
    assert recorded[-1] == steps - 1


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_wrong_checkpoint_intervals(every):
    with pytest.raises(ValueError, match="checkpoint_every"):
        quick(plain_model(), [], checkpoint_every=every)


# --- start and moments


def test_starts_at_the_uniform_schedule():
    model = plain_model()
    uniform = uniform_schedule(model, gflops_of(model, 0.8))
    record = quick(
        model, tiny_batches(), 0.8, settings=SearchSettings(steps=3, lr=0.3, flops_loss="relative", start="uniform")
    ).history.records[0]
    assert (record.after_pruning, record.after_merging) == (uniform.after_pruning, uniform.after_merging)
    zeros = quick(model, tiny_batches(), 0.8).history.records[0]
    assert len(set(zeros.after_merging[1:])) == 1


@pytest.mark.parametrize(("steps", "expected"), [(3, 0.9), (100, 0.9625), (3750, 0.999), (100_000, 0.999)])
def test_second_moments_forget_within_the_search(steps, expected):
    assert SearchSettings(steps=steps).betas == (0.9, pytest.approx(expected))


def test_start_is_checked():
    with pytest.raises(ValueError, match="start must be 'best', 'uniform' or 'zeros', got 'ones'"):
        SearchSettings(start="ones")
