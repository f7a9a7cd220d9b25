"""Torch-only definition of `bn_act_conv` and its backward, which the depthwise and pointwise ops share."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import wide
from .._normalise import InputGradients, channels, normalise, normalise_backward
from ..conv_bn_act.reference import output_format

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C / groups, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    moments: bool,
    channels_last: bool = False,
    groups: int = 1,
) -> Moments:
    """(z, its mean, its biased variance): z = conv(act(bn(x)), weight) in float32, rounded once to x's dtype.

    The moments [K] are those of the rounded z; empty where `moments` is False.
    """
    activated = _padded(normalise(x, mean, var, gamma, beta, eps, act).activated, padding)
    z = F.conv2d(activated, weight.to(activated.dtype), None, stride, 0, dilation, groups)
    z = z.to(x.dtype).contiguous(memory_format=output_format(x, channels_last))
    if not moments:
        return z, moments_like(x, 0), moments_like(x, 0)
    z_var, z_mean = torch.var_mean(wide(z), (0, 2, 3), correction=0)
    return z, z_mean, z_var


def backward_reference(
    grad: torch.Tensor,  # [N, K, Ho, Wo]
    grad_mean: torch.Tensor | None,  # [K]
    grad_var: torch.Tensor | None,  # [K]
    z: torch.Tensor | None,  # [N, K, Ho, Wo]
    z_mean: torch.Tensor | None,  # [K]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C / groups, kh, kw]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    groups: int = 1,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, mean, var, gamma, beta and weight; empty tensors for what is absent or not needed."""
    total = z_gradient(grad, grad_mean, grad_var, z, z_mean)
    parts = normalise(x, mean, var, gamma, beta, eps, act)
    activated = _padded(parts.activated, padding)
    top, bottom, left, right = padding
    mask = [need_input, need_weight, False]
    wide_weight = weight.to(total.dtype)
    geometry = (stride, [0, 0], dilation, False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(total, activated, wide_weight, None, *geometry, mask)
    empty = x.new_empty(0)
    inputs = InputGradients(*[empty] * 5)
    if need_input:
        height, width = activated.shape[2], activated.shape[3]
        inner = found[0][:, :, top : height - bottom, left : width - right]
        inputs = normalise_backward(inner, parts, x, mean, var, gamma, beta, act)
        inputs = inputs._replace(x=inputs.x.contiguous(memory_format=output_format(x, False)))
    return (*inputs, found[1].to(weight.dtype).contiguous() if need_weight else empty)


def z_gradient(
    grad: torch.Tensor,
    grad_mean: torch.Tensor | None,
    grad_var: torch.Tensor | None,
    z: torch.Tensor | None,
    z_mean: torch.Tensor | None,
) -> torch.Tensor:
    """The whole gradient of a convolution's result: directly, and through its moments."""
    total = wide(grad)
    if grad_mean is None or grad_var is None or z is None or z_mean is None:
        return total
    count = max(1, z.numel() // max(1, z.shape[1]))
    through_var = (wide(z) - channels(z_mean, total)) * (channels(grad_var, total) * (2 / count))
    return total + channels(grad_mean, total) / count + through_var


def moments_like(x: torch.Tensor, count: int) -> torch.Tensor:
    """Uninitialised moments of `count` channels, in the dtype that `x` is accumulated in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(count, dtype=dtype, device=x.device)


def _padded(a: torch.Tensor, padding: list[int]) -> torch.Tensor:
    top, bottom, left, right = padding
    return F.pad(a, (left, right, top, bottom))
