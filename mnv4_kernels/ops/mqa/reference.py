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
    q = _rows(query, height * width * heads, key.shape[2])
    k, v = wide(key), wide(value)
    weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
    y = (weights @ v).view(batch, height * width, heads * value.shape[2])
    y = y.transpose(1, 2).reshape(batch, heads * value.shape[2], height, width)
    return y.to(query.dtype).contiguous(memory_format=memory_format_of(query))


def backward_reference(
    grad: torch.Tensor,  # [N, heads * Dv, H, W]
    query: torch.Tensor,  # [N, heads * Dk, H, W]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; the attention weights are computed anew, nothing of the forward is kept."""
    rows = query.shape[2] * query.shape[3] * heads
    q, k, v = _rows(query, rows, key.shape[2]), wide(key), wide(value)
    dy = _rows(grad, rows, value.shape[2])
    weights = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
    dweights = dy @ v.transpose(1, 2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    dq = (dscores @ k).view(query.shape[0], rows // heads, query.shape[1]).transpose(1, 2).reshape(query.shape)
    return (
        dq.to(query.dtype).contiguous(memory_format=memory_format_of(query)),
        (dscores.transpose(1, 2) @ q).to(key.dtype).contiguous(),
        (weights.transpose(1, 2) @ dy).to(value.dtype).contiguous(),
    )


def _rows(x: torch.Tensor, rows: int, depth: int) -> torch.Tensor:
    """[N, heads * D, H, W] -> [N, positions * heads, D]: a position's heads are adjacent."""
    return wide(x).flatten(2).transpose(1, 2).reshape(x.shape[0], rows, depth)
