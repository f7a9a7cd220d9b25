"""Schema, fake and dispatch of `mobile_attention`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import memory_format_of
from .reference import reference


def fake(
    x: torch.Tensor,
    norm_scale: torch.Tensor | None,
    norm_shift: torch.Tensor | None,
    query_weight: torch.Tensor,
    query_shift: torch.Tensor | None,
    key_down: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    key_shift: torch.Tensor | None,
    key_project: torch.Tensor,
    value_down: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_shift: torch.Tensor | None,
    value_project: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_weight: torch.Tensor,
    output_shift: torch.Tensor | None,
    gamma: torch.Tensor | None,
    heads: int,
    scale: float,
    residual: bool,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (x.shape[0], output_weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


mobile_attention = define(
    "mobile_attention(Tensor x, Tensor? norm_scale, Tensor? norm_shift, Tensor query_weight, Tensor? query_shift, "
    "Tensor? key_down, Tensor? key_scale, Tensor? key_shift, Tensor key_project, Tensor? value_down, "
    "Tensor? value_scale, Tensor? value_shift, Tensor value_project, int[] stride, SymInt[] padding, int[] dilation, "
    "Tensor output_weight, Tensor? output_shift, Tensor? gamma, int heads, float scale, bool residual) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "query_weight", "key_down", "key_project", "value_down", "value_project", "output_weight"),
)
