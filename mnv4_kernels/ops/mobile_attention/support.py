"""What can run `mobile_attention`; on a GPU its halves are ops of their own, two kernels."""

from __future__ import annotations

from typing import Any

import torch

from ..support import CPP_DTYPES, Backend, cpp, dtype_name
from .contract import mobile_attention

_KERNEL = cpp(mobile_attention)
_NAMES = tuple(argument.name for argument in mobile_attention._schema.arguments)


def supports(*arguments: Any) -> list[str]:
    """Why the engine can't run this call; empty list: it can."""
    named = dict(zip(_NAMES, arguments, strict=False))
    asked = (named[name] for name in ("x", "query_weight", "key_down", "value_down", "heads", "scale"))
    return [*_KERNEL.reasons(*arguments), *declined(*asked)]


def declined(
    x: torch.Tensor,
    query_weight: torch.Tensor,
    key_down: torch.Tensor | None,
    value_down: torch.Tensor | None,
    heads: int,
    scale: float,
) -> list[str]:
    """What the engine's attention does not compute of a call, in words; empty list: it computes all."""
    reasons = [] if x.dtype in CPP_DTYPES else [f"`x` is {dtype_name(x.dtype)}"]
    root = (query_weight.shape[0] // heads) ** -0.5
    if abs(scale - root) > 1e-12:
        reasons.append(f"`scale` is {scale}; the engine multiplies the scores with {root}, the root of 1 / key_dim")
    if (key_down is None) != (value_down is None):
        reasons.append("only one of keys and values is down-sampled")
    return reasons


BACKENDS = (Backend(_KERNEL.name, supports),)
