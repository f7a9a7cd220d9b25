"""Schema, fake and dispatch of `mqa`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import memory_format_of
from .reference import reference


def fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (query.shape[0], heads * value.shape[2], query.shape[2], query.shape[3])
    return torch.empty(size, dtype=query.dtype, device=query.device, memory_format=memory_format_of(query))


mqa = define(
    "mqa(Tensor query, Tensor key, Tensor value, int heads, float scale) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("query", "key", "value"),
)
