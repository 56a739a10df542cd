"""Finding and reading the user's pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputValueError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Pictures that could be read, and why the others could not."""

    images: Tensor
    """(n, C, H, W), what the transform made of them."""
    paths: list[Path]
    """Where each of the n images came from."""
    skipped: list[tuple[Path, str]]
    """Files that are no readable picture, with the reason."""


def find_pictures(path: str | Path) -> list[Path]:
    """The picture ``path`` itself, or all pictures in the folder ``path`` and its sub-folders, sorted.

    In a folder, a picture is a file with one of the usual extensions (:data:`EXTENSIONS`, in any case).

    Raises:
        FileNotFoundError: there is no such file or folder, or no picture in the folder.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not found:
            raise FileNotFoundError(f"no pictures ({', '.join(EXTENSIONS)}) in the folder {path} or below it")
        return found
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder of pictures: {path}")
    return [path]


def spread(paths: list[Path], limit: int) -> list[Path]:
    """At most ``limit`` of the paths, evenly spread: the first ones of a sorted folder are often all of one kind."""
    if limit < 1:
        raise InputValueError(f"the number of images must be at least 1, got {limit}")
    if len(paths) <= limit:
        return paths
    return [paths[i * len(paths) // limit] for i in range(limit)]


def read_picture(path: Path) -> Image.Image:
    """The picture as RGB, upright (cameras store how they were held)."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("P", "LA", "PA", "RGBA"):
            # what is transparent shows white, as on most web pages, not the arbitrary colour stored under it
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def load_pictures(paths: Iterable[Path], transform: Callable[[Image.Image], Tensor]) -> Pictures:
    """Read and transform pictures; unreadable ones are left out and named in the result.

    Args:
        paths: picture files.
        transform: RGB picture -> tensor (C, H, W), as timm.data.create_transform makes.

    Raises:
        InputValueError: none of the pictures could be read.
    """
    images: list[Tensor] = []
    read: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for path in paths:
        try:
            picture = read_picture(path)
        except Exception as error:  # PIL's decoders raise almost anything on a damaged file
            skipped.append((path, reason_of(error)))
            continue
        images.append(transform(picture))
        read.append(path)
    if not images:
        named = "; ".join(f"{path}: {reason}" for path, reason in skipped[:3])
        raise InputValueError(f"none of the {len(skipped)} pictures could be read ({named or 'none given'})")
    return Pictures(torch.stack(images), read, skipped)


def reason_of(error: Exception) -> str:
    """Why a picture could not be read, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a known format"  # PIL's own message repeats the path
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
