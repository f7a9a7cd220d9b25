"""Schema, fake and dispatch of `uib`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import conv_output_size, memory_format_of
from .reference import reference


def output_size(
    weight: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: tuple[int, int],
) -> tuple[int, int]:
    """Height and width behind an optional depthwise convolution of a map of `size`."""
    if weight is None:
        return size
    return (
        conv_output_size(size[0], weight.shape[2], stride[0], padding[0], padding[1], dilation[0]),
        conv_output_size(size[1], weight.shape[3], stride[1], padding[2], padding[3], dilation[1]),
    )


def fake(
    x: torch.Tensor,
    start_weight: torch.Tensor | None,
    start_scale: torch.Tensor | None,
    start_shift: torch.Tensor | None,
    start_stride: list[int],
    start_padding: list[int],
    start_dilation: list[int],
    expand_weight: torch.Tensor,
    expand_scale: torch.Tensor | None,
    expand_shift: torch.Tensor | None,
    mid_weight: torch.Tensor | None,
    mid_scale: torch.Tensor | None,
    mid_shift: torch.Tensor | None,
    mid_stride: list[int],
    mid_padding: list[int],
    mid_dilation: list[int],
    act: str,
    project_weight: torch.Tensor,
    project_scale: torch.Tensor | None,
    project_shift: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: bool,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (x.shape[2], x.shape[3])
    size = output_size(start_weight, start_stride, start_padding, start_dilation, size)
    size = output_size(mid_weight, mid_stride, mid_padding, mid_dilation, size)
    shape = (x.shape[0], project_weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


uib = define(
    "uib(Tensor x, Tensor? start_weight, Tensor? start_scale, Tensor? start_shift, int[] start_stride, "
    "SymInt[] start_padding, int[] start_dilation, Tensor expand_weight, Tensor? expand_scale, Tensor? expand_shift, "
    "Tensor? mid_weight, Tensor? mid_scale, Tensor? mid_shift, int[] mid_stride, SymInt[] mid_padding, "
    "int[] mid_dilation, str act, Tensor project_weight, Tensor? project_scale, Tensor? project_shift, "
    "Tensor? gamma, bool residual) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "start_weight", "expand_weight", "mid_weight", "project_weight"),
)
