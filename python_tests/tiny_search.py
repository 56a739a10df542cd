"""A search of seconds on a tiny model, in this process or as a script that is killed or shared among processes."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import diffrate_ext  # noqa: F401  before timm: it makes a torchvision of another torch importable

# isort: split
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffrate_ext.compression.flops import flops
from diffrate_ext.rate_search import checkpoints
from diffrate_ext.rate_search.loop import SearchResult, search
from diffrate_ext.rate_search.settings import SearchSettings
from diffrate_ext.training.processes import joined

STEPS, CLASSES, IMAGES = 12, 5, 20


def tiny_model(**changes: Any) -> VisionTransformer:
    """65 tokens, 4 blocks; dropout, so that the random numbers of the forward matter, too."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = VisionTransformer(**{**shape, "num_classes": CLASSES, "proj_drop_rate": 0.1, **changes})
    with torch.no_grad():  # attention that tells the tokens apart
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)
    return model.eval()


class NoisyImages(Dataset[tuple[Tensor, int]]):
    """Labelled random images, with noise that changes from one access to the next."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
        return image + 0.1 * torch.randn(3, 32, 32) + 0.1 * random.random(), i % CLASSES


def shuffled_loader(batch_size: int = 4) -> DataLoader[Any]:
    """Five batches to an epoch, in another order each time."""
    return DataLoader(NoisyImages(), batch_size=batch_size, shuffle=True)


def tiny_batches(n: int = 4, batch_size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(batch_size, 3, 32, 32, generator=generator),
            torch.randint(0, CLASSES, (batch_size,), generator=generator),
        )
        for _ in range(n)
    ]


def search_once(folder: Path, *, resume: bool = False, **options: Any) -> SearchResult:
    """The search that the tests of resuming stop and continue."""
    model = tiny_model()
    target = gflops_of(model, 0.6)
    settings = SearchSettings(steps=STEPS, lr=0.2, seed=3)
    arguments: dict[str, Any] = {"output": folder, "resume": resume, "checkpoint_every": 3, **options}
    return search(model, shuffled_loader(), target, settings, **arguments)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(calls: int, function: Any) -> Any:
    """``function``, that kills this process when it is called once more than ``calls`` times."""
    left = [calls]

    def counted(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            _die()
        left[0] -= 1
        return function(*arguments, **options)

    return counted


def killed_search(folder: Path, when: str) -> None:
    """Run the search until the process kills itself, as kill -9 does."""
    if when == "between checkpoints":  # step 8 of 12, the third of its epoch; the last checkpoint is after step 6
        search_once(folder, report=_die_after(7, lambda record: None))
    elif when == "while a checkpoint is written":  # the second one: its temporary file is there, half written
        write = torch.save
        left = [1]

        def half(content: Any, path: Path) -> None:
            write(content, path)
            if left[0] == 0:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                _die()
            left[0] -= 1

        torch.save = half  # type: ignore[assignment]
        search_once(folder)
    elif when == "before the history is written":
        os.replace = _die_after(3, os.replace)
        search_once(folder)
    elif when == "before the schedule is written":
        checkpoints.SearchFolder.save_schedule = _die  # type: ignore[method-assign]
        search_once(folder)
    else:
        raise ValueError(when)


def failing_on_one_rank() -> None:
    """A search in several processes, in one of which the loader fails."""
    with joined(torch.device("cpu")):
        batches = tiny_batches()

        def loader(start: int) -> Any:
            yield batches[0]
            if os.environ["RANK"] == "1":
                raise ValueError("a broken loader on rank 1")
            yield from batches[1:]

        search(tiny_model(), loader, gflops_of(tiny_model(), 0.6), SearchSettings(steps=50))


def gflops_of(model, share: float) -> float:
    return share * flops(model) / 1e9


def plain_model(**changes):
    """Without dropout: what it computes can be computed again."""
    return tiny_model(proj_drop_rate=0.0, **changes)


def quick(model, loader, share: float = 0.6, *, settings=None, **options):
    settings = settings or SearchSettings(steps=3, lr=0.3, start="zeros", flops_loss="relative")
    return search(model, loader, gflops_of(model, share), settings, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fail on one rank":
        failing_on_one_rank()
    else:
        killed_search(Path(sys.argv[1]), sys.argv[2])
