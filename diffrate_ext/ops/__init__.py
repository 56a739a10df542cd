"""The operators, one file each: arguments and errors, fake kernel (shapes without data), gradient.

Notation: B images, N tokens of which the first P (``prefix``) are class and register tokens (the class token is index
0), C channels, H heads, D channels per head. All tensors are batch first; float32, float16, bfloat16, or float64.
Importances and sizes are float32 whatever the features are (float64 beside float64), because half-precision importances
tie and half-precision sizes lose sums. Results are deterministic. Wrong arguments raise InputValueError (a ValueError)
or InputTypeError (a TypeError).

"The paper" is DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997). ``diffrate_ext.reference`` says in plain PyTorch
what each operator computes.
"""

from __future__ import annotations

from .. import _build  # noqa: F401  first: it loads the operators
from ._norm import Norm
from .add_norm import AddedTokens, add_norm
from .bipartite_match import bipartite_match
from .class_attention import class_attention
from .compose_slots import compose_slots
from .compression_rate import compression_rate
from .masked_attention import masked_attention
from .masked_prune_merge import MaskedTokens, masked_prune_merge
from .merge_reduce import merge_reduce
from .proportional_attention import proportional_attention
from .prune_merge import MergedTokens, NormalizedTokens, prune_merge
from .received_attention import received_attention
from .restore_tokens import restore_tokens
from .sort_tokens import SortedTokens, sort_tokens

__all__ = [
    "AddedTokens",
    "MaskedTokens",
    "MergedTokens",
    "Norm",
    "NormalizedTokens",
    "SortedTokens",
    "add_norm",
    "bipartite_match",
    "class_attention",
    "compose_slots",
    "compression_rate",
    "masked_attention",
    "masked_prune_merge",
    "merge_reduce",
    "proportional_attention",
    "prune_merge",
    "received_attention",
    "restore_tokens",
    "sort_tokens",
]
