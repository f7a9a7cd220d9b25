"""Torch-only definition of `pwconv_bn_act`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, wide
from ..layout import memory_format_of


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, 1, 1]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    act: str,
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, H, W]
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(conv1x1(x, weight) * scale + shift) * gamma + residual, in float32, rounded once to x's dtype."""
    operand = wide(x)
    y = F.conv2d(operand, weight.to(operand.dtype))
    y = affine_act(y, scale, shift, act)
    if gamma is not None:
        y = y * gamma.to(y.dtype).view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))
