"""Train the embedded model on Fashion-MNIST and write what the package ships.

    apt-get install dataset-fashion-mnist
    python scripts/train_embedded.py --workdir /tmp/embedded

About an hour on two cores, minutes on a GPU. Most epochs see a random quarter of the patches (cheap, and a
strong regulariser), the last ones half and then all of them. It can be killed and started again: it resumes from the
last half epoch in --workdir. Writes embedded.safetensors, search_images.npz and test_images.npz in diffrate_ext/data
and prints the accuracy of the float16 weights, as shipped, on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchDropout
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from tqdm import tqdm

from diffrate_ext import embedded

DATA = Path(__file__).resolve().parents[1] / "diffrate_ext" / "data"
# (half epochs, share of the patches that a training step drops, flips and shifts). The test images are neither flipped
# nor shifted, and dropping patches regularises enough: augmentation helps at the start and costs accuracy at the end.
PHASES = ((7, 0.75, True), (10, 0.75, False), (2, 0.5, False), (1, 0.0, False))


def read_idx(path: Path) -> torch.Tensor:
    """A gzipped IDX file of unsigned bytes, the format of MNIST."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def read_split(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    return images[:, None], labels.long()


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random horizontal flip and a random shift by up to two pixels for each image."""
    n, _, height, width = images.shape
    images = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2))
    top, left = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    device = next(model.parameters()).device
    hits = 0
    for chunk, truth in zip(images.split(250), labels.split(250), strict=True):
        hits += (model(embedded.normalize(chunk).to(device)).argmax(1).cpu() == truth).sum().item()
    return hits / len(labels)


def save_images(name: str, images: torch.Tensor, labels: torch.Tensor, per_class: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for label in range(len(embedded.CLASSES)):
        of_class = (labels == label).nonzero()[:, 0]
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:per_class]])
    index = torch.cat(chosen)[torch.randperm(per_class * len(chosen), generator=generator)]
    np.savez_compressed(
        DATA / f"{name}_images.npz", images=images[index, 0].numpy(), labels=labels[index].numpy().astype(np.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--workdir", type=Path, required=True, help="where the checkpoint is kept")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_images, train_labels = read_split(args.dataset, "train")
    test_images, test_labels = read_split(args.dataset, "t10k")
    DATA.mkdir(exist_ok=True)
    save_images("search", train_images, train_labels, per_class=100)
    save_images("test", test_images, test_labels, per_class=200)

    model = embedded.build_model()
    with torch.no_grad():  # knowing the grid from the first step saves epochs on so few images
        model.pos_embed[:, 1:] = build_sincos2d_pos_embed([14, 14], dim=96, temperature=100.0)
    model.to(args.device)
    model.patch_drop = PatchDropout(prob=0.5, num_prefix_tokens=1)
    ema = ModelEmaV3(model, decay=0.998, use_warmup=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=args.lr
    )
    steps_per_half = len(train_images) // args.batch_size // 2
    plan = [(drop, augmented) for halves, drop, augmented in PHASES for _ in range(halves)]
    total = len(plan) * steps_per_half
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, lr_min=1e-5, warmup_t=500, warmup_lr_init=1e-6, t_in_epochs=False
    )

    args.workdir.mkdir(parents=True, exist_ok=True)
    checkpoint, first = args.workdir / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["half"] + 1

    for half in range(first, len(plan)):
        drop, augmented = plan[half]
        torch.manual_seed(args.seed + half)
        generator = torch.Generator().manual_seed(args.seed + half)
        model.train()
        model.patch_drop.prob = drop
        order = torch.randperm(len(train_images), generator=generator)
        batches = order[: steps_per_half * args.batch_size].view(steps_per_half, args.batch_size)
        progress = tqdm(batches, desc=f"half epoch {half + 1}/{len(plan)}, {drop:.0%} of the patches dropped")
        for i, batch in enumerate(progress):
            images = augment(train_images[batch], generator) if augmented else train_images[batch]
            images = embedded.normalize(images).to(args.device)
            loss = F.cross_entropy(model(images), train_labels[batch].to(args.device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step = half * steps_per_half + i + 1
            scheduler.step_update(step)
            ema.update(model, step=step)
            if i % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")
        state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "half": half}, checkpoint)
        top1 = accuracy(ema.module, test_images[:1000], test_labels[:1000])
        print(f"half epoch {half + 1}: top-1 {top1:.4f} on 1,000 test images")

    shipped = {name: tensor.half().cpu().contiguous() for name, tensor in ema.module.state_dict().items()}
    save_file(shipped, DATA / "embedded.safetensors")
    top1 = accuracy(embedded.load_model().to(args.device), test_images, test_labels)
    print(f"shipped weights: top-1 {top1:.4f} on 10,000 test images")


if __name__ == "__main__":
    main()
