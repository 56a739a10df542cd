"""Compression schedules: how many tokens are left after each block's pruning and after its merging.

Numbers and JSON only: nothing here knows a model.
"""

from __future__ import annotations

import json
import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputTypeError, InputValueError

if TYPE_CHECKING:
    from os import PathLike

FORMAT_VERSION = 2

KeptNumbers = tuple[tuple[int, int], ...]
"""(k_p, k_m) of each block: tokens left after pruning, and after merging."""


class PublishedSchedule(NamedTuple):
    """One of the schedules that the authors of DiffRate published."""

    model: str
    """The paper's name of the model, such as "ViT-S-DeiT"."""
    weights: str
    """timm's name of the weights that it was learned on."""
    gflops: float
    """Multiply-accumulates of one image / 1e9, as the paper rounds them."""


# The paper's name of each model, and timm's name of the weights that its schedules were learned on.
_WEIGHTS = {
    "ViT-T-DeiT": "deit_tiny_patch16_224.fb_in1k",
    "ViT-S-DeiT": "deit_small_patch16_224.fb_in1k",
    "ViT-B-DeiT": "deit_base_patch16_224.fb_in1k",
    "ViT-B-MAE": "vit_base_patch16_224.mae",
    "ViT-L-MAE": "vit_large_patch16_224.mae",
    "ViT-H-MAE": "vit_huge_patch14_224.mae",
    "CAFormer-S36": "caformer_s36.sail_in1k",
}

# Architectures in timm that have the shape of one of these models.
_ARCHITECTURES = {
    **{weights.partition(".")[0]: name for name, weights in _WEIGHTS.items()},
    "vit_tiny_patch16_224": "ViT-T-DeiT",
    "vit_small_patch16_224": "ViT-S-DeiT",
}

# For these, timm's name without a tag means the authors' weights.
_SAME_BY_DEFAULT = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "caformer_s36")


@dataclass(frozen=True)
class Schedule:
    """How many tokens are left after each block's pruning and merging, the prefix tokens included.

    Stored as what really happens: where a number is larger than one before it, the smaller one counts (the running
    minimum), as in the paper's schedules. Each stage of a hierarchical model starts anew.

    Attributes:
        after_pruning: tokens left after pruning, one number per block. None: nothing is pruned (merging only).
        after_merging: tokens left after merging, one number per block.
        prefix: prefix tokens of the model (class token, registers); they are never pruned, merged or merged into.
        grid: (rows, columns) of the patches the numbers are meant for. None: those of the model it is applied to.
        model: timm's name of the model the schedule was made for, with the tag of its weights where it is known.
        stages: blocks in each stage of a hierarchical model (CAFormer). None: one stage.
        method: what the numbers were made for, as :func:`diffrate_ext.compress` takes it, which goes by it unless told
            otherwise.

    Raises:
        InputTypeError: a number that is not an integer.
        InputValueError: no numbers, lengths that differ, a number below ``prefix`` or above the grid's tokens, or a
            block that would merge although no patch is left to merge into (``after_merging[i] == prefix``; section 3
            of the paper).
    """

    after_pruning: Sequence[int] | None = None
    after_merging: Sequence[int] = ()
    prefix: int = 1
    grid: tuple[int, int] | None = None
    model: str | None = None
    stages: Sequence[int] | None = None
    method: str = "diffrate"

    def __post_init__(self) -> None:
        # frozen: attributes can be set only this way
        set_ = object.__setattr__
        set_(self, "prefix", _integer(self.prefix, "prefix"))
        if self.prefix < 0:
            raise InputValueError(f"prefix must be 0 or more, got {self.prefix}")
        merged = _integers(self.after_merging, "after_merging")
        if not merged:
            raise InputValueError("after_merging must hold one number per block, got none")
        pruned = None if self.after_pruning is None else _integers(self.after_pruning, "after_pruning")
        if pruned is not None and len(pruned) != len(merged):
            raise InputValueError(
                "after_pruning and after_merging must have one number per block each, "
                f"got {len(pruned)} and {len(merged)}"
            )
        if self.grid is not None:
            grid = _integers(self.grid, "grid")
            if len(grid) != 2 or min(grid) < 1:
                raise InputValueError(f"grid must be two positive numbers (rows, columns), got {self.grid}")
            set_(self, "grid", grid)
        if self.model is not None and not isinstance(self.model, str):
            raise InputTypeError(f"model must be a string or None, got {type(self.model).__name__}")
        if not isinstance(self.method, str):
            raise InputTypeError(f"method must be a string, got {type(self.method).__name__}")
        if self.stages is not None:
            stages = _integers(self.stages, "stages")
            if min(stages, default=0) < 1 or sum(stages) != len(merged):
                raise InputValueError(
                    f"stages must be numbers of blocks that add up to {len(merged)}, got {list(self.stages)}"
                )
            set_(self, "stages", stages)
        self._check_numbers("after_pruning", pruned or ())
        self._check_numbers("after_merging", merged)
        minima = [numbers for stage in self.slices() for numbers in _running_minima(pruned, merged, stage)]
        for block, (after_pruning, after_merging) in enumerate(minima):
            # however many tokens come in: merging down to the prefix has no destination
            if after_merging == self.prefix and after_pruning != after_merging:
                raise InputValueError(
                    f"after_merging[{block}] = {after_merging} leaves no patch to merge into (prefix = {self.prefix}); "
                    f"prune to it instead (after_pruning[{block}] = {after_merging})"
                )
        set_(self, "after_pruning", None if pruned is None else tuple(int(number) for number, _ in minima))
        set_(self, "after_merging", tuple(int(number) for _, number in minima))

    def _check_numbers(self, name: str, numbers: Sequence[int]) -> None:
        most = None if self.grid is None else self.prefix + self.grid[0] * self.grid[1]
        least = max(self.prefix, 1)
        for block, number in enumerate(numbers):
            if number < least:
                raise InputValueError(
                    f"{name}[{block}] = {number}, but at least {least} tokens are always kept (prefix = {self.prefix})"
                )
            if most is not None and number > most:
                raise InputValueError(f"{name}[{block}] = {number}, but the grid {self.grid} has only {most} tokens")

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.after_merging)

    def slices(self) -> list[slice]:
        """Which blocks each stage has."""
        ends = list(_running_sums(self.stages or [len(self.after_merging)]))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def kept_numbers(self, tokens: int) -> KeptNumbers:
        """What each block keeps when ``tokens`` tokens (prefix included) enter every stage.

        Returns:
            (k_p, k_m) per block, with ``prefix + 1 <= k_m < k_p <= N`` or ``prefix <= k_m = k_p <= N``, N being the
            number of tokens that reach the block. ``k_m == N``: the block removes nothing.
        """
        tokens = _integer(tokens, "tokens")
        if tokens < self.prefix:
            raise InputValueError(f"tokens = {tokens} is fewer than the {self.prefix} prefix tokens")
        found = []
        for blocks in self.slices():
            minima = _running_minima(self.after_pruning, self.after_merging, blocks, tokens)
            found += [(int(pruned), int(merged)) for pruned, merged in minima]
        return tuple(found)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule as JSON."""
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "method": self.method,
            "prefix": self.prefix,
            "grid": self.grid,
            "stages": self.stages,
            "after_pruning": self.after_pruning,
            "after_merging": self.after_merging,
            "library_version": _library_version(),
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a schedule that :meth:`save` wrote, now or in format version 1.

        Raises:
            OSError: the file does not exist (FileNotFoundError) or cannot be read.
            InputValueError: it is no JSON, of an unknown format version, lacks a key, or holds impossible numbers.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputValueError(f"{path} is not a schedule: it is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise InputValueError(f"{path} is not a schedule: expected a JSON object, got {type(content).__name__}")
        version = content.get("format_version", FORMAT_VERSION)
        if version not in (1, FORMAT_VERSION):
            raise InputValueError(
                f"{path} has format version {version!r}, this diffrate_ext ({_library_version()}) reads versions 1 "
                f"and {FORMAT_VERSION}"
            )
        names = ("prune", "merge") if version == 1 else ("after_pruning", "after_merging")
        missing = [key for key in ("format_version", *names, "prefix") if key not in content]
        if missing:
            raise InputValueError(f"{path} is not a schedule: it lacks {', '.join(missing)}")
        pruned, merged = (content[name] for name in names)
        try:
            stages = _stages_of_version_1(content) if version == 1 else content.get("stages")
            method = content.get("method", "diffrate")
            return cls(pruned, merged, content["prefix"], content.get("grid"), content.get("model"), stages, method)
        except (TypeError, ValueError) as error:
            raise InputValueError(f"{path} is not a usable schedule: {error}") from error

    @classmethod
    def published(cls, name: str, gflops: float | str) -> Schedule:
        """A schedule that the authors published.

        Warns (UserWarning) where ``name`` stands for other weights than those it was learned on: it may cost these more
        accuracy.

        Args:
            name: the paper's name of a model (:meth:`available` lists them), or timm's name of the same architecture,
                with or without the tag of its weights.
            gflops: which of the model's schedules, as the paper names it, for example 2.9.
        """
        schedules = _published()
        paper_name = _paper_name(name)
        if paper_name is None:
            raise InputValueError(
                f"no published schedule for {name!r}; there are {', '.join(schedules)} and, as timm names them, "
                f"{', '.join(_ARCHITECTURES)}"
            )
        try:
            wanted = float(gflops)
        except (TypeError, ValueError):
            raise InputValueError(f"gflops must be a number, got {gflops!r}") from None
        numbers = next((found for key, found in schedules[paper_name].items() if float(key) == wanted), None)
        if numbers is None:
            raise InputValueError(
                f"no published schedule of {gflops} GFLOPs for {name!r}; available: {', '.join(schedules[paper_name])}"
            )
        weights = _WEIGHTS[paper_name]
        if name not in (paper_name, weights, *_SAME_BY_DEFAULT):
            warnings.warn(
                f"the published schedule for {name} was learned on {weights} (in the paper: {paper_name}); weights of "
                "another training may lose more accuracy under it",
                stacklevel=2,
            )
        hierarchical = numbers["prune"] is None
        prefix = 0 if hierarchical else 1
        side = math.isqrt(numbers["merge"][0] - prefix)
        return cls(
            numbers["prune"],
            numbers["merge"],
            prefix=prefix,
            grid=(side, side),
            model=weights if name == paper_name else name,
            stages=(18, 3) if hierarchical else None,
        )

    @staticmethod
    def available(name: str | None = None) -> list[PublishedSchedule]:
        """The schedules that :meth:`published` knows, the mildest of each model first.

        Args:
            name: only those of this model, by its name in the paper or in timm; none where it has none.
        """
        wanted = list(_WEIGHTS) if name is None else [_paper_name(name)]
        return [
            PublishedSchedule(paper_name, _WEIGHTS[paper_name], gflops)
            for paper_name in wanted
            if paper_name is not None
            for gflops in sorted((float(key) for key in _published()[paper_name]), reverse=True)
        ]


def scale_kept_numbers(numbers: KeptNumbers, tokens: int, new_tokens: int, prefix: int, fewest: int) -> KeptNumbers:
    """The same rates for another number of tokens, as an image of another size has it.

    Args:
        fewest: tokens that a block must be left with to merge; where it had so many, it keeps so many.
    """
    old, new = max(tokens - prefix, 1), new_tokens - prefix

    def scale(kept: int) -> int:
        # rounded up, so that a patch to merge into remains
        scaled = prefix - (-(kept - prefix) * new // old)
        return min(max(scaled, min(kept, fewest)), new_tokens)

    return tuple((scale(pruned), scale(merged)) for pruned, merged in numbers)


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two of timm's names may mean the same weights. A name, or a tag, that is not known fits any."""
    if one is None or other is None:
        return True
    (architecture, _, tag), (other_architecture, _, other_tag) = one.partition("."), other.partition(".")
    return architecture == other_architecture and (not tag or not other_tag or tag == other_tag)


def _running_minima(
    pruned: Sequence[int] | None, merged: Sequence[int], blocks: slice, tokens: float = math.inf
) -> list[tuple[float, float]]:
    """(k_p, k_m) of each of a stage's blocks, for so many tokens at its input."""
    minima = []
    left = tokens
    for block in range(blocks.start, blocks.stop):
        after_pruning = left if pruned is None else min(left, pruned[block])
        left = min(after_pruning, merged[block])
        minima.append((after_pruning, left))
    return minima


def _running_sums(numbers: Iterable[int]) -> Iterable[int]:
    total = 0
    for number in numbers:
        total += number
        yield total


def _stages_of_version_1(content: dict[str, Any]) -> tuple[int, ...] | None:
    """Version 1 did not say where a hierarchical model's stages begin: where a number rises, but not to the full grid.

    (Only hierarchical models have no prefix and no pruning; their last block of a stage may name the full grid.)
    """
    merged, grid = content["merge"], content.get("grid")
    if content["prune"] is not None or content["prefix"] != 0 or grid is None or not isinstance(merged, list):
        return None
    starts, left = [0], merged[0]
    for block, number in enumerate(merged):
        if left < number != grid[0] * grid[1]:
            starts.append(block)
            left = number
        left = min(left, number)
    return tuple(end - start for start, end in zip(starts, [*starts[1:], len(merged)], strict=True))


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise InputTypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise InputTypeError(f"{name} must be an integer, got {value!r}") from None


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputTypeError(f"{name} must be a list of integers, got {values!r}")
    return tuple(_integer(value, f"{name}[{index}]") for index, value in enumerate(values))


def _paper_name(name: str) -> str | None:
    """The paper's name of a model under its name there or in timm."""
    architecture, _, tag = name.partition(".")
    if name in _WEIGHTS:
        return name
    # weights for 384 x 384 pixels have more tokens than the schedules
    return None if tag.endswith("_384") else _ARCHITECTURES.get(architecture)


@cache
def _published() -> dict[str, dict[str, dict[str, Any]]]:
    path = resources.files("diffrate_ext") / "data" / "published_schedules.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _library_version() -> str:
    try:
        return metadata.version("diffrate-ext")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
