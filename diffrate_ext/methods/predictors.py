"""What DynamicViT learns: small networks that say which patches matter, and their file."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import ops
from ..errors import InputValueError
from ..models.adapter import Adapter
from ..models.fusing import fusable_norm
from ..modes import is_traced
from ..numeric import TINY, wide_dtype
from ..schedule import same_model

_FORMAT = "diffrate_ext predictors 1"


class Predictor(nn.Module):
    """Whether to keep each patch of one block, by its own features and those of all that are still there.

    A LayerNorm and a layer with GELU; half of its channels stay each patch's own, the mean is taken of the other half;
    an MLP of three layers makes two numbers of both, which say keep and drop.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.norm = nn.LayerNorm(channels)
        self.embed = nn.Linear(channels, channels)
        # The MLP's first layer in two parts: what it makes of the mean is the same for all patches of an image.
        self.own = nn.Linear(half, half)
        self.shared = nn.Linear(channels - half, half, bias=False)
        self.hidden = nn.Linear(half, quarter)
        self.decide = nn.Linear(quarter, 2)
        self._copies: dict[tuple[torch.device, torch.dtype], Predictor] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, n, 2), to keep and to drop each of the patches (B, n, C).

        Args:
            mask: (B, n), 1 for patches that are still there, 0 for others; differentiable. None: all are there.
        """
        return self._logits(self._normalized(x), mask).log_softmax(-1)

    @torch.no_grad()
    def scores(self, x: Tensor, branch: Tensor, prefix: int) -> Tensor:
        """How much speaks for each patch of the sum of tokens (B, N, C), (B, N-P): it orders patches as ``forward``."""
        predictor = self._like(x)
        norm = fusable_norm(predictor.norm, x, branch)
        normalized = predictor._normalized(x + branch) if norm is None else ops.add_norm(x, branch, norm).normalized
        keep, drop = predictor._logits(normalized[:, prefix:], None).unbind(-1)
        return keep - drop

    def _logits(self, normalized: Tensor, mask: Tensor | None) -> Tensor:
        features = F.gelu(_linear(self.embed, normalized))
        own, shared = features.split([self.own.in_features, self.shared.in_features], dim=-1)
        if mask is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weight = mask / mask.sum(1, keepdim=True).clamp_min(TINY)
            mean = weight.to(shared.dtype)[:, None] @ shared
        x = F.gelu(_linear(self.own, own) + _linear(self.shared, mean))
        x = _linear(self.decide, F.gelu(_linear(self.hidden, x)))
        return x.to(wide_dtype(x))

    def _normalized(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)

    def _like(self, x: Tensor) -> Predictor:
        """The same on the device and in the dtype of x: a copy, which is made once."""
        weight, key = self.norm.weight, (x.device, x.dtype)
        if weight.device == x.device and weight.dtype == x.dtype:
            return self
        if key not in self._copies:
            if is_traced():  # a copy made now would belong to the trace; each layer takes its weights there instead
                return self
            self._copies[key] = copy.deepcopy(self).to(*key)
        return self._copies[key]

    def __getstate__(self) -> dict[str, object]:  # of pickle and deepcopy
        return {**self.__dict__, "_copies": {}}


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer whose weights follow the tokens: the model may have been moved, or be of half precision."""
    return F.linear(x, layer.weight.to(x), None if layer.bias is None else layer.bias.to(x))


class Predictors(nn.Module):
    """A :class:`Predictor` for each of some blocks of one model.

    They belong to the method, not to the model: neither its parameters nor its state_dict hold them, and they go where
    the model's tokens are. So do not change them any more once a model uses them.

    Args:
        channels: of the model's tokens.
        depth: blocks of the model.
        blocks: those that have a predictor, counted from 0.
        model: timm's name of the model, with the tag of its weights where it is known.

    Attributes:
        file: where they were last saved to, or loaded from; None: nowhere.
    """

    def __init__(self, channels: int, depth: int, blocks: Iterable[int], model: str | None = None) -> None:
        super().__init__()
        self.channels, self.depth, self.blocks, self.model = channels, depth, tuple(sorted(set(blocks))), model
        self.file: str | None = None
        self.of_block = nn.ModuleDict({str(block): Predictor(channels) for block in self.blocks})

    @classmethod
    def untrained(cls, adapter: Adapter, blocks: Iterable[int]) -> Predictors:
        """With random weights, by torch's generator, for a VisionTransformer."""
        channels = adapter.model.embed_dim
        assert isinstance(channels, int)
        return cls(channels, sum(len(stage.blocks) for stage in adapter.stages), blocks, adapter.name)

    def get(self, block: int) -> Predictor | None:
        """The predictor of a block, if it has one."""
        predictor = self.of_block[str(block)] if block in self.blocks else None
        assert predictor is None or isinstance(predictor, Predictor)
        return predictor

    def check(self, adapter: Adapter) -> None:
        """Raise InputValueError when they were trained for another model."""
        if not same_model(self.model, adapter.name):
            raise InputValueError(f"the predictors were trained for {self.model}, and the model is {adapter.name}")
        channels, depth = adapter.model.embed_dim, sum(len(stage.blocks) for stage in adapter.stages)
        if (self.channels, self.depth) != (channels, depth):
            raise InputValueError(
                f"the predictors are for {self.depth} blocks of {self.channels} channels, the model has {depth} of "
                f"{channels}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a .safetensors file."""
        metadata = {
            "format": _FORMAT,
            "channels": str(self.channels),
            "depth": str(self.depth),
            "blocks": ",".join(map(str, self.blocks)),
            "model": self.model or "",
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, path, metadata)
        self.file = os.fspath(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictors:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            InputValueError: it holds no predictors.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it cannot be iterated
            if metadata.get("format") != _FORMAT:
                raise InputValueError(f"{path} holds no predictors as train_predictors makes them")
            blocks = map(int, metadata["blocks"].split(","))
            found = cls(int(metadata["channels"]), int(metadata["depth"]), blocks, metadata["model"] or None)
            found.load_state_dict(state)
            found.file = os.fspath(path)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise InputValueError(f"{path} holds no predictors: {str(error).splitlines()[0]}") from None
        return found.requires_grad_(False)
