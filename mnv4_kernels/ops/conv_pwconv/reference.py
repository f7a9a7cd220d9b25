"""Torch-only definition of `conv_pwconv`."""

from __future__ import annotations

import torch

from ..conv_bn_act.reference import reference as convolution
from ..layout import is_channels_last
from ..pwconv_bn_act.reference import reference as product


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    conv_weight: torch.Tensor,  # [E, C, kh, kw]
    conv_scale: torch.Tensor | None,  # [E]
    conv_shift: torch.Tensor | None,  # [E]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    conv_act: str,
    weight: torch.Tensor,  # [K, E, 1, 1]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    act: str,
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, OH, OW]
) -> torch.Tensor:
    """y = act(conv1x1(h, weight) * scale + shift) * gamma + residual, h = conv_act(conv(x) * conv_scale + conv_shift).

    Both convolutions accumulate in float32; h is rounded once to x's dtype, as the operand of a matrix product.
    """
    geometry = (stride, padding, dilation, conv_act, is_channels_last(x))
    h = convolution(x, conv_weight, conv_scale, conv_shift, *geometry)
    return product(h, weight, scale, shift, act, gamma, residual)
