"""Torch-only definition of `dwconv_bn_act`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, wide
from ..layout import memory_format_of


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [C, 1, kh, kw]
    scale: torch.Tensor | None,  # [C]
    shift: torch.Tensor | None,  # [C]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    act: str,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(dwconv(x, weight) * scale + shift), accumulated in float32, rounded once to x's dtype."""
    top, bottom, left, right = padding
    padded = F.pad(wide(x), (left, right, top, bottom))
    y = F.conv2d(padded, weight.to(padded.dtype), None, stride, 0, dilation, groups=x.shape[1])
    y = affine_act(y, scale, shift, act)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))
