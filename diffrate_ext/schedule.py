"""Compression schedules: how many tokens each block keeps after pruning and after merging."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flops as flops_

if TYPE_CHECKING:
    from os import PathLike

    from torch import nn

    from .models import Stage

FORMAT_VERSION = 1

Steps = tuple[tuple[int, int], ...]  # (k_p, k_m) of each block

# timm's names (without the tag of the weights) of the architectures whose schedules the authors published
_TIMM_NAMES = {
    "deit_tiny_patch16_224": "ViT-T-DeiT",
    "deit_small_patch16_224": "ViT-S-DeiT",
    "deit_base_patch16_224": "ViT-B-DeiT",
    "vit_tiny_patch16_224": "ViT-T-DeiT",
    "vit_small_patch16_224": "ViT-S-DeiT",
    "vit_base_patch16_224": "ViT-B-MAE",
    "vit_large_patch16_224": "ViT-L-MAE",
    "vit_huge_patch14_224": "ViT-H-MAE",
    "caformer_s36": "CAFormer-S36",
}


@dataclass(frozen=True)
class Schedule:
    """Kept numbers of every block; they count the prefix tokens (class token, registers).

    The numbers need not fall from block to block: the running minimum counts (see :meth:`steps`), as in the published
    schedules.

    Attributes:
        prune: tokens kept after pruning, one number per block. None: nothing is pruned (merging only).
        merge: tokens kept after merging, one number per block.
        prefix: prefix tokens of the model; they are never pruned, merged or merged into.
        grid: (rows, columns) of the patches the numbers are meant for. None: those of the model it is applied to.
        model: name of the model the schedule was made for; information only.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: no numbers, lengths that differ, a number below ``prefix`` or above the grid's tokens, or a block
            that would merge although no patch is left to merge into (``merge[i] == prefix``, paper section 3.3).
    """

    prune: Sequence[int] | None = None
    merge: Sequence[int] = ()
    prefix: int = 1
    grid: tuple[int, int] | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        # frozen: attributes can be set only this way
        set_ = object.__setattr__
        set_(self, "prefix", _integer(self.prefix, "prefix"))
        if self.prefix < 0:
            raise ValueError(f"prefix must be 0 or more, got {self.prefix}")
        set_(self, "merge", _integers(self.merge, "merge"))
        if not self.merge:
            raise ValueError("merge must hold one kept number per block, got none")
        if self.prune is not None:
            set_(self, "prune", _integers(self.prune, "prune"))
            if len(self.prune) != len(self.merge):
                raise ValueError(
                    f"prune and merge must have one number per block each, got {len(self.prune)} and {len(self.merge)}"
                )
        if self.grid is not None:
            grid = _integers(self.grid, "grid")
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"grid must be two positive numbers (rows, columns), got {self.grid}")
            set_(self, "grid", grid)
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model must be a string or None, got {type(self.model).__name__}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        most = None if self.grid is None else self.prefix + self.grid[0] * self.grid[1]
        for name, numbers in (("prune", self.prune or ()), ("merge", self.merge)):
            for block, number in enumerate(numbers):
                if number < max(self.prefix, 1):
                    raise ValueError(
                        f"{name}[{block}] = {number}, but at least {max(self.prefix, 1)} "
                        f"tokens are always kept (prefix = {self.prefix})"
                    )
                if most is not None and number > most:
                    raise ValueError(f"{name}[{block}] = {number}, but the grid {self.grid} has only {most} tokens")
        # however many tokens come in: merging down to the prefix has no destination
        for block, (pruned, merged) in enumerate(_running_minima(self.prune, self.merge, None)):
            if merged == self.prefix and pruned != merged:
                raise ValueError(
                    f"merge[{block}] = {merged} leaves no patch to merge into (prefix = {self.prefix}); "
                    f"prune to it instead (prune[{block}] = {merged})"
                )

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.merge)

    def steps(self, tokens: int) -> Steps:
        """What each block really keeps when ``tokens`` tokens (prefix included) enter the first block.

        Returns:
            (k_p, k_m) per block, with ``prefix + 1 <= k_m < k_p <= N`` or ``prefix <= k_m = k_p <= N``, N being the
            number of tokens that reach the block. ``k_m == N``: the block removes nothing.
        """
        tokens = _integer(tokens, "tokens")
        if tokens < self.prefix:
            raise ValueError(f"tokens = {tokens} is fewer than the {self.prefix} prefix tokens")
        minima = _running_minima(self.prune, self.merge, tokens)
        return tuple((int(pruned), int(merged)) for pruned, merged in minima)

    def gflops(self, model: nn.Module) -> float:
        """Multiply-accumulates of one image through ``model`` under this schedule, in units of 1e9."""
        return flops_.flops(model, self) / 1e9

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule as JSON."""
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "prefix": self.prefix,
            "grid": self.grid,
            "prune": self.prune,
            "merge": self.merge,
            "library_version": _library_version(),
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Read a schedule that :meth:`save` wrote.

        Raises:
            OSError: the file does not exist (FileNotFoundError) or cannot be read.
            ValueError: it is no JSON, of an unknown format version, lacks a key, or holds impossible numbers.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a schedule: it is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a schedule: expected a JSON object, got {type(content).__name__}")
        if "format_version" in content and content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {content['format_version']!r}, this diffrate_ext ({_library_version()}) "
                f"reads version {FORMAT_VERSION}"
            )
        missing = [key for key in ("format_version", "prune", "merge", "prefix") if key not in content]
        if missing:
            raise ValueError(f"{path} is not a schedule: it lacks {', '.join(missing)}")
        try:
            return cls(content["prune"], content["merge"], content["prefix"], content.get("grid"), content.get("model"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable schedule: {error}") from error

    @classmethod
    def published(cls, name: str, gflops: float | str) -> Schedule:
        """A schedule the authors published.

        Args:
            name: ``"ViT-{T,S,B}-DeiT"``, ``"ViT-{B,L,H}-MAE"``, ``"CAFormer-S36"``, or timm's name of the same
                architecture, with or without the tag of its weights.
            gflops: which of the model's schedules, as the paper names it, for example 2.9.
        """
        schedules = _published()
        paper_name = _paper_name(name)
        if paper_name is None:
            raise ValueError(
                f"no published schedule for {name!r}; there are {', '.join(schedules)} and, as timm names them, "
                f"{', '.join(_TIMM_NAMES)}"
            )
        try:
            wanted = float(gflops)
        except (TypeError, ValueError):
            raise ValueError(f"gflops must be a number, got {gflops!r}") from None
        for key, numbers in schedules[paper_name].items():
            if float(key) == wanted:
                prefix = 1 if numbers["prune"] is not None else 0
                side = math.isqrt(numbers["merge"][0] - prefix)
                return cls(numbers["prune"], numbers["merge"], prefix=prefix, grid=(side, side), model=name)
        raise ValueError(
            f"no published schedule of {gflops} GFLOPs for {name!r}; available: {', '.join(schedules[paper_name])}"
        )

    @classmethod
    def uniform(cls, model: nn.Module, gflops: float) -> Schedule:
        """A simple rule, where no learned schedule is at hand.

        Every block but the first removes the same number of tokens (up to rounding), half of them by pruning, half by
        merging; in a hierarchical model, which is never pruned, all by merging. The number is chosen so that the
        GFLOPs are as near to ``gflops`` as whole tokens allow: within 1 % but for models of few tokens.

        Raises:
            ValueError: ``gflops`` is more than the uncompressed model takes or less than the rule can reach.
        """
        # here, because the models need the operators, and a schedule alone does not
        from .models import adapter_for

        adapter = adapter_for(model)
        stages, cost = adapter.stages(model), flops_.model_cost(model)

        def flops_of(rate: float) -> int:
            return cost.total([_uniform_numbers(stage, rate) for stage in stages])

        fastest, target = float(max(stage.tokens for stage in stages)), float(gflops) * 1e9
        if not flops_of(fastest) * 0.99 <= target <= flops_of(0) * 1.01:
            raise ValueError(
                f"{gflops} GFLOPs cannot be reached: the model takes {flops_of(0) / 1e9:.4g} uncompressed, and "
                f"{flops_of(fastest) / 1e9:.4g} with all the tokens removed that this rule may remove"
            )
        low, high = 0.0, fastest  # tokens removed per block; FLOPs fall with it, in steps
        for _ in range(50):
            middle = (low + high) / 2
            if flops_of(middle) > target:
                low = middle
            else:
                high = middle
        rate = min((low, high), key=lambda rate: abs(flops_of(rate) - target))

        prune, merge = [], []
        for stage in stages:
            tokens = stage.tokens
            for kept in _uniform_numbers(stage, rate):
                prune.append(kept + (tokens - kept) // 2)
                merge.append(kept)
                tokens = kept
        return cls(
            prune if adapter.prunes else None,
            merge,
            prefix=adapter.prefix(model),
            grid=stages[0].grid,
            model=adapter.name(model),
        )


def published_gflops(name: str) -> list[float]:
    """The GFLOPs for which :meth:`Schedule.published` has a schedule of this model, falling; none if it knows none."""
    paper_name = _paper_name(name)
    return [] if paper_name is None else sorted((float(key) for key in _published()[paper_name]), reverse=True)


def scale_steps(steps: Steps, tokens: int, new_tokens: int, prefix: int) -> Steps:
    """The same rates for another number of tokens, as an image of another size has it."""
    old, new = max(tokens - prefix, 1), new_tokens - prefix

    def scale(kept: int) -> int:
        # rounded up, so that a patch to merge into remains
        return prefix - (-(kept - prefix) * new // old)

    return tuple((scale(pruned), scale(merged)) for pruned, merged in steps)


def _uniform_numbers(stage: Stage, rate: float) -> list[int]:
    """Tokens kept by each block of a stage that removes ``rate`` tokens in every block that may compress."""
    numbers, compressing = [], 0
    for compressible in stage.compressible:
        compressing += compressible
        numbers.append(min(stage.tokens, max(stage.fewest, stage.tokens - round(rate * compressing))))
    return numbers


def _running_minima(
    prune: Sequence[int] | None, merge: Sequence[int], tokens: int | None
) -> list[tuple[int | float, int | float]]:
    """(k_p, k_m) per block for so many tokens at the input; None: as many as one likes."""
    minima: list[tuple[int | float, int | float]] = []
    left: int | float = math.inf if tokens is None else tokens
    for block, merged in enumerate(merge):
        after_pruning = left if prune is None else min(left, prune[block])
        left = min(after_pruning, merged)
        minima.append((after_pruning, left))
    return minima


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of integers, got {values!r}")
    return tuple(_integer(value, f"{name}[{index}]") for index, value in enumerate(values))


def _paper_name(name: str) -> str | None:
    """The name in the published schedules of a model under its name there or in timm."""
    architecture, _, tag = name.partition(".")
    if name in _published():
        return name
    # weights for 384 x 384 pixels have more tokens than the schedules
    return None if tag.endswith("_384") else _TIMM_NAMES.get(architecture)


@cache
def _published() -> dict[str, dict[str, dict[str, Any]]]:
    path = resources.files("diffrate_ext") / "data" / "published_schedules.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _library_version() -> str:
    try:
        return metadata.version("diffrate-ext")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
