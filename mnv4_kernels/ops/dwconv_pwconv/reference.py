"""Torch-only definition of `dwconv_pwconv`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, wide
from ..layout import memory_format_of


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    dw_weight: torch.Tensor,  # [C, 1, kh, kw]
    dw_scale: torch.Tensor | None,  # [C]
    dw_shift: torch.Tensor | None,  # [C]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    dw_act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    act: str,
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, OH, OW]
) -> torch.Tensor:
    """y = act(conv1x1(h, weight) * scale + shift) * gamma + residual, h = dw_act(dwconv(x) * dw_scale + dw_shift).

    Both convolutions accumulate in float32; h is rounded once to x's dtype, as the operand of a matrix product.
    """
    top, bottom, left, right = padding
    h = F.pad(wide(x), (left, right, top, bottom))
    h = F.conv2d(h, dw_weight.to(h.dtype), None, stride, 0, dilation, groups=x.shape[1])
    h = affine_act(h, dw_scale, dw_shift, dw_act)
    operand = h.to(x.dtype).to(h.dtype)
    y = affine_act(F.conv2d(operand, weight.to(operand.dtype)), scale, shift, act)
    if gamma is not None:
        y = y * gamma.to(y.dtype).view(1, -1, 1, 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))
