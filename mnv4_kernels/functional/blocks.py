"""Blocks and halves of blocks in one call, and the model's head.

Half blocks have kernels for GPUs only: on a CPU the reference answers, in plain torch, and the ops of their parts are
what is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from ..ops.conv_pwconv import support as conv_pwconv_support
from ..ops.conv_pwconv.reference import reference as conv_pwconv_reference
from ..ops.dwconv_pwconv import support as dwconv_pwconv_support
from ..ops.dwconv_pwconv.reference import reference as dwconv_pwconv_reference
from ..ops.head import support as head_support
from ..ops.head.reference import reference as head_reference
from ..ops.uib import support as uib_support
from ..ops.uib.contract import output_size
from ..ops.uib.reference import reference as uib_reference
from ._run import run


def head(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [F, C, 1, 1]
    scale: torch.Tensor | None = None,  # [F]
    shift: torch.Tensor | None = None,  # [F]
    *,
    act: str = "none",
    classifier_weight: torch.Tensor | None = None,  # [K, F]
    classifier_bias: torch.Tensor | None = None,  # [K]
    packed: torch.Tensor | None = None,
    classifier_packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """classifier(act(conv1x1(mean of x, weight) * scale + shift)).

    The model's head (MobileNet-V4 paper, tables 11 to 15; timm's `MobileNetV3`:
    `global_pool`, `conv_head`, `norm_head`, `act2`, `classifier`). Everything between x and
    the logits is float32.

    Args:
        x: [N, C, H, W].
        weight: [F, C, 1, 1], x's dtype.
        scale: [F], float32; None is 1.
        shift: [F], float32; None is 0.
        act: the activation's name.
        classifier_weight: [K, F], x's dtype, or None: the features are the answer.
        classifier_bias: [K], x's dtype, or None.
        packed: `prepack(weight, scale)`, which spares the C++ kernel the packing.
        classifier_packed: `prepack(classifier_weight[:, :, None, None])`.

    Returns:
        Logits [N, K], or features [N, F] without a classifier; x's dtype.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device or activation is wrong, or a bias comes without its weight.
    """
    check_activation("x", x)
    check_operand("weight", weight, x)
    check_pointwise("weight", weight, x.shape[1])
    features = weight.shape[0]
    check_channels("scale", scale, features, x)
    check_channels("shift", shift, features, x)
    check_act(act)
    check_packed("packed", packed, weight)
    if classifier_weight is None:
        for name, value in (("classifier_bias", classifier_bias), ("classifier_packed", classifier_packed)):
            if value is not None:
                raise ValueError(f"`{name}` must come with `classifier_weight`, got `classifier_weight` = None")
    else:
        check_operand("classifier_weight", classifier_weight, x)
        if classifier_weight.dim() != 2 or classifier_weight.shape[1] != features:
            raise shape_error("classifier_weight", f"[K, {features}]", classifier_weight)
        check_packed("classifier_packed", classifier_packed, classifier_weight)
        if classifier_bias is not None:
            check_operand("classifier_bias", classifier_bias, x)
            if classifier_bias.shape != classifier_weight.shape[:1]:
                raise shape_error("classifier_bias", f"[{classifier_weight.shape[0]}]", classifier_bias)
    arguments = (x, weight, scale, shift, act, classifier_weight, classifier_bias, packed, classifier_packed)
    return run(ops.head, head_support.BACKENDS, head_reference, arguments, operands=(0, 1, 5, 6))


def dwconv_pwconv(
    x: torch.Tensor,  # [N, C, H, W]
    dw_weight: torch.Tensor,  # [C, 1, kh, kw]
    weight: torch.Tensor,  # [K, C, 1, 1]
    *,
    dw_scale: torch.Tensor | None = None,  # [C]
    dw_shift: torch.Tensor | None = None,  # [C]
    dw_act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    scale: torch.Tensor | None = None,  # [K]
    shift: torch.Tensor | None = None,  # [K]
    act: str = "none",
    gamma: torch.Tensor | None = None,  # [K]
    residual: torch.Tensor | None = None,  # [N, K, H', W']
) -> torch.Tensor:
    """pwconv_bn_act(dwconv_bn_act(x)): the depthwise convolution as the operand of the product behind it.

    Half a universal inverted bottleneck (MobileNet-V4 paper, section 3.1; timm's `dw_start` and `pw_exp`, or `dw_mid`
    and `pw_proj`). What is between them is rounded to x's dtype, as the operand of a matrix product. Where a cost model
    says so, a GPU keeps it in registers.

    Args:
        x: [N, C, H, W].
        dw_weight: [C, 1, kh, kw], x's dtype.
        weight: [K, C, 1, 1], x's dtype.
        dw_scale: [C], float32; None is 1.
        dw_shift: [C], float32; None is 0.
        dw_act: the activation behind the depthwise convolution.
        stride: of the depthwise convolution, int or (vertical, horizontal).
        padding: of the depthwise convolution, as in `dwconv_bn_act`.
        dilation: of the depthwise convolution, int or (vertical, horizontal).
        scale: [K], float32; None is 1.
        shift: [K], float32; None is 0.
        act: the activation behind the 1x1 convolution.
        gamma: [K], float32: the layer scale, applied after `act`.
        residual: [N, K, H', W'], x's dtype, any memory format; added in float32 before the rounding.

    Returns:
        [N, K, H', W'], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device, activation or geometry is wrong, or the output would be empty.
    """
    check_activation("x", x)
    check_operand("dw_weight", dw_weight, x)
    check_depthwise("dw_weight", dw_weight, x.shape[1])
    first = (dw_scale, dw_shift, dw_act)
    second = (weight, scale, shift, act, gamma, residual)
    arguments = _half(x, "dw", dw_weight, first, (stride, padding, dilation), second)
    backends = dwconv_pwconv_support.BACKENDS
    return run(ops.dwconv_pwconv, backends, dwconv_pwconv_reference, arguments, operands=(0, 1, 8, 13))


def conv_pwconv(
    x: torch.Tensor,  # [N, C, H, W]
    conv_weight: torch.Tensor,  # [E, C, kh, kw]
    weight: torch.Tensor,  # [K, E, 1, 1]
    *,
    conv_scale: torch.Tensor | None = None,  # [E]
    conv_shift: torch.Tensor | None = None,  # [E]
    conv_act: str = "none",
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    scale: torch.Tensor | None = None,  # [K]
    shift: torch.Tensor | None = None,  # [K]
    act: str = "none",
    gamma: torch.Tensor | None = None,  # [K]
    residual: torch.Tensor | None = None,  # [N, K, H', W']
) -> torch.Tensor:
    """pwconv_bn_act(conv_bn_act(x)): a fused inverted bottleneck.

    MobileNet-V4 paper, tables 11 to 15; timm's `EdgeResidual`, and a `ConvBnAct` with the 1x1 one behind it. What is
    between them is rounded to x's dtype, as the operand of a matrix product. Where a cost model says so, a GPU keeps it
    on chip.

    Args:
        x: [N, C, H, W].
        conv_weight: [E, C, kh, kw], x's dtype.
        weight: [K, E, 1, 1], x's dtype.
        conv_scale: [E], float32; None is 1.
        conv_shift: [E], float32; None is 0.
        conv_act: the activation behind the dense convolution.
        stride: of the dense convolution, int or (vertical, horizontal).
        padding: of the dense convolution, as in `conv_bn_act`.
        dilation: of the dense convolution, int or (vertical, horizontal).
        scale: [K], float32; None is 1.
        shift: [K], float32; None is 0.
        act: the activation behind the 1x1 convolution.
        gamma: [K], float32: the layer scale, applied after `act`.
        residual: [N, K, H', W'], x's dtype, any memory format; added in float32 before the rounding.

    Returns:
        [N, K, H', W'], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device, activation or geometry is wrong, or the output would be empty.
    """
    check_activation("x", x)
    check_operand("conv_weight", conv_weight, x)
    check_dense("conv_weight", conv_weight, x.shape[1])
    first = (conv_scale, conv_shift, conv_act)
    second = (weight, scale, shift, act, gamma, residual)
    arguments = _half(x, "conv", conv_weight, first, (stride, padding, dilation), second)
    return run(ops.conv_pwconv, conv_pwconv_support.BACKENDS, conv_pwconv_reference, arguments, operands=(0, 1, 8, 13))


def uib(
    x: torch.Tensor,  # [N, C, H, W]
    expand_weight: torch.Tensor,  # [E, C, 1, 1]
    project_weight: torch.Tensor,  # [K, E, 1, 1]
    *,
    act: str = "none",
    start_weight: torch.Tensor | None = None,  # [C, 1, kh, kw]
    start_scale: torch.Tensor | None = None,  # [C]
    start_shift: torch.Tensor | None = None,  # [C]
    start_stride: int | Sequence[int] = 1,
    start_padding: Padding = "same",
    start_dilation: int | Sequence[int] = 1,
    expand_scale: torch.Tensor | None = None,  # [E]
    expand_shift: torch.Tensor | None = None,  # [E]
    mid_weight: torch.Tensor | None = None,  # [E, 1, kh, kw]
    mid_scale: torch.Tensor | None = None,  # [E]
    mid_shift: torch.Tensor | None = None,  # [E]
    mid_stride: int | Sequence[int] = 1,
    mid_padding: Padding = "same",
    mid_dilation: int | Sequence[int] = 1,
    project_scale: torch.Tensor | None = None,  # [K]
    project_shift: torch.Tensor | None = None,  # [K]
    gamma: torch.Tensor | None = None,  # [K]
    residual: bool = False,
) -> torch.Tensor:
    """project(act(mid(act(expand(start(x)))))) * gamma + x: a whole universal inverted bottleneck.

    Each part is a convolution with its scale and shift; both depthwise ones may be missing, and `start` and `project`
    have no activation (MobileNet-V4 paper, section 3.1 and figure 4; timm's `UniversalInvertedResidual`). Operands of
    products and the expanded map are rounded to x's dtype. Which launches a GPU makes of it, a cost model decides
    (`mnv4_kernels.explain`).

    Args:
        x: [N, C, H, W].
        expand_weight: [E, C, 1, 1], x's dtype.
        project_weight: [K, E, 1, 1], x's dtype.
        act: the activation behind `expand` and behind `mid`.
        start_weight: [C, 1, kh, kw], x's dtype, or None: no depthwise convolution before the expansion.
        start_scale: [C], float32; None is 1.
        start_shift: [C], float32; None is 0.
        start_stride: int or (vertical, horizontal).
        start_padding: as in `dwconv_bn_act`.
        start_dilation: int or (vertical, horizontal).
        expand_scale: [E], float32; None is 1.
        expand_shift: [E], float32; None is 0.
        mid_weight: [E, 1, kh, kw], x's dtype, or None: no depthwise convolution behind the expansion.
        mid_scale: [E], float32; None is 1.
        mid_shift: [E], float32; None is 0.
        mid_stride: int or (vertical, horizontal).
        mid_padding: as in `dwconv_bn_act`.
        mid_dilation: int or (vertical, horizontal).
        project_scale: [K], float32; None is 1.
        project_shift: [K], float32; None is 0.
        gamma: [K], float32: the layer scale.
        residual: add x, which must have the result's shape.

    Returns:
        [N, K, H', W'], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device, activation or geometry is wrong, the output would be empty, what belongs to a
            depthwise convolution comes without its weight, or there is nothing that x could be added to.
    """
    check_activation("x", x)
    channels = x.shape[1]
    check_operand("expand_weight", expand_weight, x)
    check_pointwise("expand_weight", expand_weight, channels)
    hidden = expand_weight.shape[0]
    check_operand("project_weight", project_weight, x)
    check_pointwise("project_weight", project_weight, hidden)
    outputs = project_weight.shape[0]
    given = (start_scale, start_shift, start_stride, start_padding, start_dilation)
    start, size = _depthwise("start", start_weight, given, channels, x, (x.shape[2], x.shape[3]), "`x`")
    given = (mid_scale, mid_shift, mid_stride, mid_padding, mid_dilation)
    mid, size = _depthwise("mid", mid_weight, given, hidden, x, size, "the expanded map")
    check_channels("expand_scale", expand_scale, hidden, x)
    check_channels("expand_shift", expand_shift, hidden, x)
    check_channels("project_scale", project_scale, outputs, x)
    check_channels("project_shift", project_shift, outputs, x)
    check_channels("gamma", gamma, outputs, x)
    check_act(act)
    if residual and (outputs, *size) != tuple(x.shape[1:]):
        raise ValueError(f"`residual` needs a result of x's shape, {tuple(x.shape[1:])}, got {(outputs, *size)}")
    expand = (expand_weight, expand_scale, expand_shift)
    project = (project_weight, project_scale, project_shift, gamma, bool(residual))
    arguments = (x, *start, *expand, *mid, act, *project)
    return run(ops.uib, uib_support.BACKENDS, uib_reference, arguments, operands=(0, 1, 7, 10, 17))


def _half(
    x: torch.Tensor,
    prefix: str,
    first_weight: torch.Tensor,
    first: tuple[Any, ...],  # scale, shift, activation
    given: tuple[Any, ...],  # stride, padding, dilation
    second: tuple[Any, ...],  # weight, scale, shift, activation, gamma, residual
) -> tuple[Any, ...]:
    """The arguments of the op of a convolution and the 1x1 convolution behind it, checked but for `first_weight`."""
    first_scale, first_shift, first_act = first
    weight, scale, shift, act, gamma, residual = second
    hidden = first_weight.shape[0]
    check_operand("weight", weight, x)
    check_pointwise("weight", weight, hidden)
    filters = weight.shape[0]
    check_channels(f"{prefix}_scale", first_scale, hidden, x)
    check_channels(f"{prefix}_shift", first_shift, hidden, x)
    check_channels("scale", scale, filters, x)
    check_channels("shift", shift, filters, x)
    check_channels("gamma", gamma, filters, x)
    check_act(first_act, f"{prefix}_act")
    check_act(act)
    form = geometry(x.shape[2:], first_weight, *given, weight_name=f"{prefix}_weight")
    check_residual(residual, (x.shape[0], filters, *output_size(first_weight, *form, (x.shape[2], x.shape[3]))), x)
    return (x, first_weight, first_scale, first_shift, *form, first_act, *second)


def _depthwise(
    prefix: str,
    weight: torch.Tensor | None,
    given: tuple[Any, ...],  # scale, shift, stride, padding, dilation
    channels: int,
    x: torch.Tensor,
    size: tuple[int, int],
    map_name: str,
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """(the op's arguments of an optional depthwise convolution, height and width behind it)."""
    scale, shift, *form = given
    if weight is None:
        for name, value in ((f"{prefix}_scale", scale), (f"{prefix}_shift", shift)):
            if value is not None:
                raise ValueError(f"`{name}` must come with `{prefix}_weight`, got `{prefix}_weight` = None")
        return (None, None, None, [1, 1], [0, 0, 0, 0], [1, 1]), size
    check_operand(f"{prefix}_weight", weight, x)
    check_depthwise(f"{prefix}_weight", weight, channels)
    check_channels(f"{prefix}_scale", scale, channels, x)
    check_channels(f"{prefix}_shift", shift, channels, x)
    checked = geometry(size, weight, *form, weight_name=f"{prefix}_weight", prefix=f"{prefix}_", map_name=map_name)
    return (weight, scale, shift, *checked), output_size(weight, *checked, size)
