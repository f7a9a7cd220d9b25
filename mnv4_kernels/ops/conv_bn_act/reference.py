"""Torch-only definition of `conv_bn_act`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, wide
from ..layout import memory_format_of


def output_format(x: torch.Tensor, channels_last: bool) -> torch.memory_format:
    """NHWC where asked for or where `x` is NHWC."""
    return torch.channels_last if channels_last else memory_format_of(x)


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, kh, kw]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    act: str,
    channels_last: bool,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(conv(x, weight) * scale + shift), accumulated in float32, rounded once to x's dtype."""
    top, bottom, left, right = padding
    padded = F.pad(wide(x), (left, right, top, bottom))
    y = F.conv2d(padded, weight.to(padded.dtype), None, stride, 0, dilation)
    y = affine_act(y, scale, shift, act)
    return y.to(x.dtype).contiguous(memory_format=output_format(x, channels_last))
