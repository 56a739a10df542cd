"""The benchmark of model families: which models it takes, what a record says, and how its page shows it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny_models import tiny_caformer
from torch import nn

from diffrate_ext import compress, embedded, flops, uniform_schedule
from diffrate_ext.images.sources import ImageSource, some_of
from diffrate_ext.models import ADAPTERS, adapter_for

pytest.importorskip("transformers", minversion="5")


def pictures() -> ImageSource:
    return some_of(families.embedded_test_pictures(), range(20))


TRAINED = families.Representative("`VisionTransformer`", "embedded", embedded.load_model, batch=2, pictures=pictures)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def features() -> nn.Module:
    """The embedded model without its head."""
    model = embedded.load_model()
    model.reset_classifier(0)
    return model


def test_every_family_has_a_representative_that_reaches_its_share(tmp_path: Path) -> None:
    reached = set()
    for one in families.representatives(tmp_path):
        if one.pictures is None:
            with torch.device("meta"):
                model = one.build()
            schedule = uniform_schedule(model, one.share)
            assert flops(model, schedule) / flops(model) == pytest.approx(float(one.share[:-1]) / 100, abs=0.01)
            reached.add(type(adapter_for(model)))
    assert reached == set(ADAPTERS)


def test_a_record_of_a_model_with_classes() -> None:
    model = embedded.load_model()
    schedule = uniform_schedule(model, "60%")
    record = families.measured(TRAINED, rounds=2, most_pictures=5)
    assert record["uncompressed_gflops"] == flops(model) / 1e9
    assert record["gflops"] == flops(model, schedule) / 1e9
    assert (record["tokens"], record["tokens_left"]) == (197, schedule.after_merging[-1])
    assert (record["image_size"], record["batch"], record["rounds"]) == (28, 2, 2)
    assert record["speed_up"]["low"] <= record["speed_up"]["median"] <= record["speed_up"]["high"]
    assert record["kept"]["pictures"] == 5
    assert record["kept"]["measure"] == "same class"


def test_speed_up_is_uncompressed_over_compressed_cpu_time_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 6.0, 2.0, 8.0, 2.0, 10.0, 2.0])  # both forms in turn
    monkeypatch.setattr(families, "cpu_seconds", lambda model, images: next(seconds))
    record = families.measured(replace(TRAINED, pictures=None), rounds=3)
    assert record["speed_up"]["median"] == 4.0
    assert record["seconds"] == {"uncompressed": 8.0, "diffrate_ext": 2.0}
    assert "kept" not in record


def test_tokens_are_those_of_the_stage_that_is_compressed() -> None:
    one = families.Representative("`MetaFormer`", "tiny", tiny_caformer, batch=1, share="90%")
    record = families.measured(one, rounds=2)
    assert record["tokens"] == 16
    assert uniform_schedule(tiny_caformer(), "90%").after_merging == (16, 12, 7, 7, 4, 4)  # 4: another stage
    assert record["tokens_left"] == 7


def test_cpu_time_does_not_count_waiting() -> None:
    class Waiting(nn.Module):
        def forward(self, images: torch.Tensor) -> None:
            time.sleep(0.2)

    assert 0 <= families.cpu_seconds(Waiting(), torch.zeros(1)) < 0.1


def test_everything_is_kept_where_nothing_is_removed_and_less_where_much_is() -> None:
    for build in (embedded.load_model, features):
        model = build()
        assert families.kept(model, "100%", pictures())["methods"] == pytest.approx(
            dict.fromkeys(families.METHODS, 1.0), abs=1e-6
        )
    assert families.kept(features(), "100%", pictures())["measure"] == "cosine of the features"
    some = families.kept(features(), "60%", pictures())["methods"]
    assert all(0.5 < cosine < 0.9999 for cosine in some.values())
    assert len(set(some.values())) == len(families.METHODS)  # each by its own method


def test_cosines_are_means_over_the_pictures() -> None:
    model, loaded = features(), families.evaluation_loader(pictures(), features(), batch_size=20)
    (images, _), = loaded  # fmt: skip
    with torch.inference_mode():
        reference = model(images)
        found = compress(model, uniform_schedule(model, "60%", method="tome"))(images)
    cosine = nn.functional.cosine_similarity(found, reference).mean()
    assert families.kept(features(), "60%", pictures())["methods"]["tome"] == pytest.approx(float(cosine), abs=1e-5)


def test_the_page_and_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    built = []

    def build() -> nn.Module:
        built.append(1)
        return embedded.load_model()

    plain = families.Representative("`Eva`", "random", build, quick=True)
    chosen = [plain, replace(TRAINED, quick=True), replace(plain, name="large", quick=False)]
    monkeypatch.setattr(families, "representatives", lambda cache: chosen)
    families.main(["--quick", "--output", str(tmp_path)])
    page = (tmp_path / "cpu_families.md").read_text(encoding="utf-8")
    assert "| `Eva` | random | 28 px | 8 | 0.351 → 0.211 | 197 → 42 | 1.67 | " in page
    assert re.search(r"\| embedded \| 60% \| 20: the embedded test images \| same class( \| \d+\.0%){3} \|", page)
    assert "large" not in page
    assert page in capsys.readouterr().out
    families.main(["--quick", "--resume", "--output", str(tmp_path)])
    assert len(built) == 1
    assert (tmp_path / "cpu_families.md").read_text(encoding="utf-8").count("| random |") == 1
