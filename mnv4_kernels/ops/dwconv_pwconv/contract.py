"""Schema, fake and dispatch of `dwconv_pwconv`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import empty_like_conv, memory_format_of
from .reference import reference


def fake(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_scale: torch.Tensor | None,
    dw_shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dw_act: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    kernel = (dw_weight.shape[2], dw_weight.shape[3])
    return empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, memory_format_of(x))


dwconv_pwconv = define(
    "dwconv_pwconv(Tensor x, Tensor dw_weight, Tensor? dw_scale, Tensor? dw_shift, int[] stride, SymInt[] padding, "
    "int[] dilation, str dw_act, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? gamma, "
    "Tensor? residual) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "dw_weight", "weight", "residual"),
)
