"""Faster Vision Transformers by DiffRate token compression (Chen et al., ICCV 2023).

``compress`` and ``restore`` apply a ``Schedule`` of kept tokens to a timm model; ``search`` learns one. ``ops`` holds
the operators, ``reference`` the same in plain PyTorch.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING
from typing import Any as _Any

import torch as _torch  # noqa: F401  first: it loads the libraries that diffrate_ext._C links to

from ._torchvision import make_importable as _make_torchvision_importable

_make_torchvision_importable()

from . import ops, reference  # noqa: E402
from ._build import build_info  # noqa: E402
from .errors import DivergedError, InputError, InputTypeError, InputValueError  # noqa: E402

if TYPE_CHECKING:
    from .comparison import Compared, compare
    from .compression.choice import NamedSchedule, schedule_for
    from .compression.compress import compress, restore, token_slots
    from .compression.copies import compressed_copy, uncompressed_copy
    from .compression.flops import flops
    from .compression.output_tokens import output_tokens
    from .compression.uniform import uniform_schedule
    from .cost_table import CostTable
    from .evaluation import Evaluation, evaluate
    from .finetuning.history import FinetuneHistory, FinetuneRecord
    from .finetuning.loop import FinetuneResult, finetune
    from .finetuning.quality import Quality
    from .finetuning.settings import FinetuneSettings
    from .predictor_training import PredictorSettings, train_predictors
    from .profiling import profile_model
    from .rate_search.history import SearchHistory, StepRecord
    from .rate_search.loop import SearchResult, search
    from .rate_search.rates import RateSearch
    from .rate_search.settings import SearchSettings
    from .schedule import PublishedSchedule, Schedule
    from .standard_operators import to_standard_operators
    from .timing import Benchmark, benchmark
    from .visualization import visualize

__version__ = _version("diffrate_ext")

__all__ = [
    "Benchmark",
    "Compared",
    "CostTable",
    "DivergedError",
    "Evaluation",
    "FinetuneHistory",
    "FinetuneRecord",
    "FinetuneResult",
    "FinetuneSettings",
    "InputError",
    "InputTypeError",
    "InputValueError",
    "NamedSchedule",
    "PredictorSettings",
    "PublishedSchedule",
    "Quality",
    "RateSearch",
    "Schedule",
    "SearchHistory",
    "SearchResult",
    "SearchSettings",
    "StepRecord",
    "benchmark",
    "build_info",
    "compare",
    "compress",
    "compressed_copy",
    "evaluate",
    "finetune",
    "flops",
    "ops",
    "output_tokens",
    "profile_model",
    "reference",
    "restore",
    "schedule_for",
    "search",
    "to_standard_operators",
    "token_slots",
    "train_predictors",
    "uncompressed_copy",
    "uniform_schedule",
    "visualize",
]

# Where the others are. Loaded when first used: they import timm and matplotlib, and the operators need neither.
_LAZY = {
    "Benchmark": "timing",
    "Compared": "comparison",
    "CostTable": "cost_table",
    "Evaluation": "evaluation",
    "FinetuneHistory": "finetuning.history",
    "FinetuneRecord": "finetuning.history",
    "FinetuneResult": "finetuning.loop",
    "FinetuneSettings": "finetuning.settings",
    "NamedSchedule": "compression.choice",
    "PredictorSettings": "predictor_training",
    "PublishedSchedule": "schedule",
    "Quality": "finetuning.quality",
    "RateSearch": "rate_search.rates",
    "Schedule": "schedule",
    "SearchHistory": "rate_search.history",
    "SearchResult": "rate_search.loop",
    "SearchSettings": "rate_search.settings",
    "StepRecord": "rate_search.history",
    "benchmark": "timing",
    "compare": "comparison",
    "compress": "compression.compress",
    "compressed_copy": "compression.copies",
    "evaluate": "evaluation",
    "finetune": "finetuning.loop",
    "flops": "compression.flops",
    "output_tokens": "compression.output_tokens",
    "profile_model": "profiling",
    "restore": "compression.compress",
    "schedule_for": "compression.choice",
    "search": "rate_search.loop",
    "to_standard_operators": "standard_operators",
    "token_slots": "compression.compress",
    "train_predictors": "predictor_training",
    "uncompressed_copy": "compression.copies",
    "uniform_schedule": "compression.uniform",
    "visualize": "visualization",
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
