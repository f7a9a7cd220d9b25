"""Schema, fake and dispatch of `conv_bn_act`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import empty_like_conv
from .reference import output_format, reference


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    act: str,
    channels_last: bool,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    kernel = (weight.shape[2], weight.shape[3])
    format_ = output_format(x, channels_last)
    return empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, format_)


conv_bn_act = define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[] stride, SymInt[] padding, "
    "int[] dilation, str act, bool channels_last, Tensor? packed=None) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "weight"),
)
