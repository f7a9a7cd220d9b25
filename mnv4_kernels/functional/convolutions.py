"""Convolutions with their BatchNorm, activation, layer scale and skip; what is prepared once for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops
from .._arguments import (
    Padding,
    check_act,
    check_activation,
    check_channels,
    check_dense,
    check_depthwise,
    check_operand,
    check_packed,
    check_pointwise,
    check_residual,
    geometry,
    shape_error,
)
from ..ops.conv_bn_act import support as conv_support
from ..ops.conv_bn_act.reference import reference as conv_reference
from ..ops.dwconv_bn_act import support as dwconv_support
from ..ops.dwconv_bn_act.reference import reference as dwconv_reference
from ..ops.pwconv_bn_act import support as pwconv_support
from ..ops.pwconv_bn_act.reference import reference as pwconv_reference
from ._run import run


def dwconv_bn_act(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [C, 1, kh, kw]
    scale: torch.Tensor | None = None,  # [C]
    shift: torch.Tensor | None = None,  # [C]
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    act: str = "none",
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(depthwise_conv(x, weight) * scale + shift).

    The depthwise half of a universal inverted bottleneck (MobileNet-V4 paper, section 3.1;
    timm's `ConvNormAct` with groups = channels).

    Args:
        x: [N, C, H, W].
        weight: [C, 1, kh, kw], x's dtype.
        scale: [C], float32; None is 1.
        shift: [C], float32; None is 0.
        stride: int or (vertical, horizontal).
        padding: int, (vertical, horizontal), (top, bottom, left, right), or "same":
            TensorFlow's, ceil(size / stride) outputs with the odd row or column after the image.
        dilation: int or (vertical, horizontal).
        act: the activation's name.
        packed: `prepack(weight, scale, depthwise=True)`, which spares the C++ kernel the packing.

    Returns:
        [N, C, H', W'], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device, activation or geometry is wrong, or the output would be empty.
    """
    check_activation("x", x)
    check_operand("weight", weight, x)
    channels = x.shape[1]
    check_depthwise("weight", weight, channels)
    check_channels("scale", scale, channels, x)
    check_channels("shift", shift, channels, x)
    check_act(act)
    check_packed("packed", packed, weight)
    stride, sides, dilation = geometry(x.shape[2:], weight, stride, padding, dilation)
    arguments = (x, weight, scale, shift, stride, sides, dilation, act, packed)
    return run(ops.dwconv_bn_act, dwconv_support.BACKENDS, dwconv_reference, arguments, operands=(0, 1))


def pwconv_bn_act(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, 1, 1]
    scale: torch.Tensor | None = None,  # [K]
    shift: torch.Tensor | None = None,  # [K]
    *,
    act: str = "none",
    gamma: torch.Tensor | None = None,  # [K]
    residual: torch.Tensor | None = None,  # [N, K, H, W]
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(conv1x1(x, weight) * scale + shift) * gamma + residual.

    Expansion and projection of a universal inverted bottleneck with its layer scale and skip
    (MobileNet-V4 paper, section 3.1; timm's `UniversalInvertedResidual.pw_exp`, `.pw_proj`,
    `.layer_scale`).

    Args:
        x: [N, C, H, W].
        weight: [K, C, 1, 1], x's dtype.
        scale: [K], float32; None is 1.
        shift: [K], float32; None is 0. A convolution's bias is a shift.
        act: the activation's name.
        gamma: [K], float32: the layer scale, applied after the activation.
        residual: [N, K, H, W], x's dtype, any memory format; added in float32 before the rounding.
        packed: `prepack(weight, scale)`, which spares the C++ kernel the packing.

    Returns:
        [N, K, H, W], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device or activation is wrong.
    """
    check_activation("x", x)
    check_operand("weight", weight, x)
    check_pointwise("weight", weight, x.shape[1])
    filters = weight.shape[0]
    check_channels("scale", scale, filters, x)
    check_channels("shift", shift, filters, x)
    check_channels("gamma", gamma, filters, x)
    check_residual(residual, (x.shape[0], filters, x.shape[2], x.shape[3]), x)
    check_act(act)
    check_packed("packed", packed, weight)
    arguments = (x, weight, scale, shift, act, gamma, residual, packed)
    return run(ops.pwconv_bn_act, pwconv_support.BACKENDS, pwconv_reference, arguments, operands=(0, 1, 6))


def conv_bn_act(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, kh, kw]
    scale: torch.Tensor | None = None,  # [K]
    shift: torch.Tensor | None = None,  # [K]
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    act: str = "none",
    channels_last: bool = False,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(conv(x, weight) * scale + shift), dense.

    The stem and the 3x3 of the fused inverted bottlenecks (MobileNet-V4 paper, tables 11 to
    15; timm's `conv_stem` + `bn1`, and `EdgeResidual.conv_exp`).

    Args:
        x: [N, C, H, W].
        weight: [K, C, kh, kw], x's dtype.
        scale: [K], float32; None is 1.
        shift: [K], float32; None is 0.
        stride: int or (vertical, horizontal).
        padding: int, (vertical, horizontal), (top, bottom, left, right), or "same" (TensorFlow's).
        dilation: int or (vertical, horizontal).
        act: the activation's name.
        channels_last: answer in NHWC whatever x's memory format: a stem reads NCHW images and writes NHWC.
        packed: `prepack(weight, scale)`, which spares the C++ kernel the packing.

    Returns:
        [N, K, H', W'], x's dtype; NHWC where `channels_last` or x is NHWC.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device, activation or geometry is wrong, or the output would be empty.
    """
    check_activation("x", x)
    check_operand("weight", weight, x)
    check_dense("weight", weight, x.shape[1])
    filters = weight.shape[0]
    check_channels("scale", scale, filters, x)
    check_channels("shift", shift, filters, x)
    check_act(act)
    check_packed("packed", packed, weight)
    stride, sides, dilation = geometry(x.shape[2:], weight, stride, padding, dilation)
    arguments = (x, weight, scale, shift, stride, sides, dilation, act, channels_last, packed)
    return run(ops.conv_bn_act, conv_support.BACKENDS, conv_reference, arguments, operands=(0, 1))


def prepack(
    weight: torch.Tensor,  # [C, 1, kh, kw] or [K, C, kh, kw]
    scale: torch.Tensor | None = None,  # [C] or [K]
    *,
    depthwise: bool = False,
) -> torch.Tensor:
    """`weight` * `scale` in the order in which the C++ kernels read it, to be passed as `packed`.

    A kernel that gets `packed` reads neither `weight` nor `scale`: pass the ones it was made
    from, for the backends that do, and make it anew when they change.

    Args:
        weight: [C, 1, kh, kw] with `depthwise`, else [K, C, kh, kw]; on the CPU.
        scale: one factor an output channel, float32; None is 1.
        depthwise: pack for `dwconv_bn_act`.

    Returns:
        [ceil(K / 16) * 16 * C * kh * kw], float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument has the wrong shape.
        RuntimeError: the C++ library is not loaded; only it reads packed weights.
    """
    check_activation("weight", weight, 4, "[C, 1, kh, kw]" if depthwise else "[K, C, kh, kw]")
    if depthwise and weight.shape[1] != 1:
        raise shape_error("weight", "[C, 1, kh, kw]", weight)
    check_channels("scale", scale, weight.shape[0], weight, "weight")
    values = weight.detach()
    if scale is not None:
        values = values.float() * scale.detach().view(-1, 1, 1, 1)
    packed: torch.Tensor = ops.prepack(values, depthwise)
    return packed


def fold_batch_norm(
    weight: torch.Tensor | None,  # [C]
    bias: torch.Tensor | None,  # [C]
    mean: torch.Tensor,  # [C]
    var: torch.Tensor,  # [C]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) with which x * scale + shift is eval-mode BatchNorm of x.

    scale = weight / sqrt(var + eps) and shift = bias - mean * scale, in float64, rounded once.

    Args:
        weight: [C], BatchNorm's weight; None is 1 (affine=False).
        bias: [C], BatchNorm's bias; None is 0.
        mean: [C], running mean.
        var: [C], running variance.
        eps: added to the variance.

    Returns:
        Two [C] in float32; float64 where `mean` is. Differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes or devices differ.
    """
    check_activation("mean", mean, 1, "[C]")
    for name, value in (("weight", weight), ("bias", bias), ("var", var)):
        if value is not None:
            check_activation(name, value, 1, "[C]")
            if value.shape != mean.shape:
                raise shape_error(name, f"{list(mean.shape)}, as `mean`", value)
            if value.device != mean.device:
                raise ValueError(f"`{name}` must be on `mean`'s device, {mean.device}, got {value.device}")
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale.to(dtype), shift.to(dtype)
