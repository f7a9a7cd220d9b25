"""Torch-only definition of `mqa`."""

from __future__ import annotations

import torch

from .._accumulate import wide
from ..layout import memory_format_of


def reference(
    query: torch.Tensor,  # [N, heads * Dk, H, W]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    heads: int,
    scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale) v per head -> [N, heads * Dv, H, W], in float32, rounded once."""
    batch, _, height, width = query.shape
    q = wide(query).flatten(2).transpose(1, 2).reshape(batch, height * width * heads, key.shape[2])
    k, v = wide(key), wide(value)
    weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
    y = (weights @ v).view(batch, height * width, heads * value.shape[2])
    y = y.transpose(1, 2).reshape(batch, heads * value.shape[2], height, width)
    return y.to(query.dtype).contiguous(memory_format=memory_format_of(query))
