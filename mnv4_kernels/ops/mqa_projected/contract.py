"""Schema, fake and dispatch of `mqa_projected`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import memory_format_of
from .reference import reference


def fake(
    x: torch.Tensor,
    query_weight: torch.Tensor,
    query_scale: torch.Tensor | None,
    query_shift: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (x.shape[0], output_weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


mqa_projected = define(
    "mqa_projected(Tensor x, Tensor query_weight, Tensor? query_scale, Tensor? query_shift, Tensor key, Tensor value, "
    "Tensor output_weight, Tensor? gamma, Tensor? residual, int heads, float scale) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "query_weight", "key", "value", "output_weight", "residual"),
)
