"""Run by torchrun: a compressed model and a search step, shared among processes, against the same in one process.

    parallel_training.py ddp|fsdp compressed|search

Each process compares the outputs of its part of the batch, and the gradients of the whole batch.
"""

from __future__ import annotations

import copy
import sys

import diffrate_ext  # before timm: it makes a torchvision of another torch importable

# isort: split
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

IMAGES = 4


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=5, global_pool="avg"
    )
    schedule = diffrate_ext.Schedule([65, 60, 45, 30], [65, 55, 40, 30])
    if kind == "compressed":
        return diffrate_ext.compress(model, schedule).train()
    rates = diffrate_ext.RateSearch(model, train_weights=True).train()
    rates.set_schedule(schedule)
    return rates


def share(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "model", model).blocks:
        fully_shard(block)
    return fully_shard(model)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(images)
    logits.square().mean().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name.removeprefix("module.")] = (
                gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            )
    return logits.detach(), found


def main(how: str, kind: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    images = torch.randn(IMAGES * world, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    alone = build(kind)
    expected, expected_gradients = gradients(copy.deepcopy(alone), images)
    mine = slice(rank * IMAGES, (rank + 1) * IMAGES)
    logits, found = gradients(share(alone, how), images[mine])
    torch.testing.assert_close(logits, expected[mine])
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
