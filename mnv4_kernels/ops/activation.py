"""The activations that every op's epilogue knows, by timm's names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    """`name`'s activation of `x`; raises `ValueError` on a name that no kernel knows."""
    if name not in ACTIVATIONS:
        raise ValueError(f"`act` must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](x)
