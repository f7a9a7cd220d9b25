"""Schema, fake and dispatch of `kv_downsample`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import conv_output_size
from .reference import reference


def fake(
    x: torch.Tensor,
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
    packed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same shape, dtype and strides as the kernels."""
    height, width = x.shape[2], x.shape[3]
    if key_down is not None:
        height = conv_output_size(height, key_down.shape[2], stride[0], padding[0], padding[1], dilation[0])
        width = conv_output_size(width, key_down.shape[3], stride[1], padding[2], padding[3], dilation[1])
    positions = height * width
    key = x.new_empty((x.shape[0], positions, key_project.shape[0]))
    value = x.new_empty((x.shape[0], positions, value_project.shape[0]))
    return key, value


kv_downsample = define(
    "kv_downsample(Tensor x, Tensor? key_down, Tensor? key_scale, Tensor? key_shift, Tensor key_project, "
    "Tensor? value_down, Tensor? value_scale, Tensor? value_shift, Tensor value_project, int[] stride, "
    "SymInt[] padding, int[] dilation, Tensor? packed=None) -> (Tensor, Tensor)",
    fake=fake,
    reference=reference,
    autocast=("x", "key_down", "key_project", "value_down", "value_project"),
)
