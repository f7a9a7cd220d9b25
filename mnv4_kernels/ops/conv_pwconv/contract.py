"""Schema, fake and dispatch of `conv_pwconv`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import empty_like_conv, memory_format_of
from .reference import reference


def fake(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_scale: torch.Tensor | None,
    conv_shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    conv_act: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    kernel = (conv_weight.shape[2], conv_weight.shape[3])
    return empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, memory_format_of(x))


conv_pwconv = define(
    "conv_pwconv(Tensor x, Tensor conv_weight, Tensor? conv_scale, Tensor? conv_shift, int[] stride, SymInt[] padding, "
    "int[] dilation, str conv_act, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? gamma, "
    "Tensor? residual) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "conv_weight", "weight", "residual"),
)
