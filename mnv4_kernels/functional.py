"""The fused ops as functions: friendly arguments, checked before anything runs, differentiable.

Activations are [N, C, H, W] in either memory format. The result is NHWC
(`torch.channels_last`) where the input is, else contiguous. Inputs are float32, bfloat16,
float16 or float64; sums are accumulated in float32 (float64 for float64) and the result is
rounded once, to the input's dtype. BatchNorm is given as a float32 scale and shift per
channel (`fold_batch_norm`). `act` is one of none, relu, relu6, hard_swish, silu, gelu
(erf) and gelu_tanh.

The first backend of the op's list that can run the call answers (`ops/<op>/support.py`),
else the torch-only reference, which also answers in forward-mode AD. Gradients reach every
floating-point argument but packed weights. Under autocast the activations and weights are
cast, scales and shifts are not.

A wrong type or dtype raises `TypeError`, a wrong rank, shape, device or value
`ValueError`; the message names the argument, what was expected and what was got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from ._arguments import (
    Padding,
    check_act,
    check_activation,
    check_channels,
    check_operand,
    check_packed,
    geometry,
    shape_error,
    under_autocast,
)
from .backends.tracing import forward_mode
from .ops.conv_bn_act import support as conv_support
from .ops.conv_bn_act.reference import reference as conv_reference
from .ops.dwconv_bn_act import support as dwconv_support
from .ops.dwconv_bn_act.reference import reference as dwconv_reference
from .ops.head import support as head_support
from .ops.head.reference import reference as head_reference
from .ops.kv_downsample import support as kv_support
from .ops.kv_downsample.reference import reference as kv_reference
from .ops.mqa import support as mqa_support
from .ops.mqa.reference import reference as mqa_reference
from .ops.pwconv_bn_act import support as pwconv_support
from .ops.pwconv_bn_act.reference import reference as pwconv_reference
from .ops.support import Backend

__all__ = [
    "conv_bn_act",
    "dwconv_bn_act",
    "fold_batch_norm",
    "head",
    "kv_downsample",
    "mqa",
    "prepack",
    "pwconv_bn_act",
]


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
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise shape_error("weight", f"[{channels}, 1, kh, kw]", weight)
    check_channels("scale", scale, channels, x)
    check_channels("shift", shift, channels, x)
    check_act(act)
    check_packed("packed", packed, weight)
    stride, sides, dilation = geometry(x, weight, stride, padding, dilation)
    arguments = (x, weight, scale, shift, stride, sides, dilation, act, packed)
    return _run(ops.dwconv_bn_act, dwconv_support.BACKENDS, dwconv_reference, arguments, operands=(0, 1))


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
    _check_pointwise("weight", weight, x.shape[1])
    filters = weight.shape[0]
    check_channels("scale", scale, filters, x)
    check_channels("shift", shift, filters, x)
    check_channels("gamma", gamma, filters, x)
    if residual is not None:
        check_operand("residual", residual, x)
        expected = (x.shape[0], filters, x.shape[2], x.shape[3])
        if residual.shape != expected:
            raise shape_error("residual", str(list(expected)), residual)
    check_act(act)
    check_packed("packed", packed, weight)
    arguments = (x, weight, scale, shift, act, gamma, residual, packed)
    return _run(ops.pwconv_bn_act, pwconv_support.BACKENDS, pwconv_reference, arguments, operands=(0, 1, 6))


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
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise shape_error("weight", f"[K, {x.shape[1]}, kh, kw]", weight)
    filters = weight.shape[0]
    check_channels("scale", scale, filters, x)
    check_channels("shift", shift, filters, x)
    check_act(act)
    check_packed("packed", packed, weight)
    stride, sides, dilation = geometry(x, weight, stride, padding, dilation)
    arguments = (x, weight, scale, shift, stride, sides, dilation, act, channels_last, packed)
    return _run(ops.conv_bn_act, conv_support.BACKENDS, conv_reference, arguments, operands=(0, 1))


def kv_downsample(
    x: torch.Tensor,  # [N, C, H, W]
    key_project: torch.Tensor,  # [Dk, C, 1, 1]
    value_project: torch.Tensor,  # [Dv, C, 1, 1]
    *,
    key_down: torch.Tensor | None = None,  # [C, 1, kh, kw]
    key_scale: torch.Tensor | None = None,  # [C]
    key_shift: torch.Tensor | None = None,  # [C]
    value_down: torch.Tensor | None = None,  # [C, 1, kh, kw]
    value_scale: torch.Tensor | None = None,  # [C]
    value_shift: torch.Tensor | None = None,  # [C]
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    packed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of attention from one read of x: conv1x1(depthwise_conv(x, down) * scale + shift, project).

    Mobile MQA's spatial reduction attention (MobileNet-V4 paper, section 3.2, equation 2;
    timm's `MultiQueryAttention2d.key` and `.value`, which keep separate weights). Nothing is
    rounded between the depthwise convolution and the projection.

    Args:
        x: [N, C, H, W].
        key_project: [Dk, C, 1, 1], x's dtype.
        value_project: [Dv, C, 1, 1], x's dtype.
        key_down: [C, 1, kh, kw], x's dtype, or None: no downsampling, given if and only if `value_down` is.
        key_scale: [C], float32; None is 1.
        key_shift: [C], float32; None is 0.
        value_down: as `key_down`, of the same kernel size.
        value_scale: [C], float32; None is 1.
        value_shift: [C], float32; None is 0.
        stride: of the depthwise convolutions, int or (vertical, horizontal).
        padding: of the depthwise convolutions, as in `dwconv_bn_act`.
        dilation: of the depthwise convolutions, int or (vertical, horizontal).
        packed: one after the other (torch.cat), `prepack(key_down, key_scale, depthwise=True)`,
            `prepack(key_project)` and the same of value; projections only where there is no downsampling.

    Returns:
        (key [N, P, Dk], value [N, P, Dv]), contiguous, x's dtype; P is the number of output pixels, row by row.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device or geometry is wrong, or the output would be empty.
    """
    check_activation("x", x)
    channels = x.shape[1]
    for name, project in (("key_project", key_project), ("value_project", value_project)):
        check_operand(name, project, x)
        _check_pointwise(name, project, channels)
    if (key_down is None) != (value_down is None):
        absent = "key_down" if key_down is None else "value_down"
        raise ValueError(f"`key_down` and `value_down` must be given together, got `{absent}` = None")
    if key_down is not None and value_down is not None:
        for name, down in (("key_down", key_down), ("value_down", value_down)):
            check_operand(name, down, x)
            if down.dim() != 4 or down.shape[0] != channels or down.shape[1] != 1:
                raise shape_error(name, f"[{channels}, 1, kh, kw]", down)
        if value_down.shape != key_down.shape:
            raise shape_error("value_down", f"{list(key_down.shape)}, as `key_down`", value_down)
        stride, sides, dilation = geometry(x, key_down, stride, padding, dilation, "key_down")
    else:
        stride, sides, dilation = [1, 1], [0, 0, 0, 0], [1, 1]
    check_channels("key_scale", key_scale, channels, x)
    check_channels("key_shift", key_shift, channels, x)
    check_channels("value_scale", value_scale, channels, x)
    check_channels("value_shift", value_shift, channels, x)
    check_packed("packed", packed, *(w for w in (key_down, key_project, value_down, value_project) if w is not None))
    key = (key_down, key_scale, key_shift, key_project)
    value = (value_down, value_scale, value_shift, value_project)
    arguments = (x, *key, *value, stride, sides, dilation, packed)
    return _run(ops.kv_downsample, kv_support.BACKENDS, kv_reference, arguments, operands=(0, 1, 4, 5, 8))


def mqa(
    query: torch.Tensor,  # [N, heads * Dk, H, W]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    *,
    heads: int,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for each head of queries over one shared key and value.

    Mobile multi-query attention (MobileNet-V4 paper, section 3.2, equation 1; timm's
    `MultiQueryAttention2d`). Scores, softmax and sums are float32, for every dtype.

    Args:
        query: [N, heads * Dk, H, W], head by head, as a 1x1 convolution writes it.
        key: [N, P, Dk], query's dtype.
        value: [N, P, Dv], query's dtype.
        heads: number of query heads.
        scale: of the scores; None is Dk ** -0.5.

    Returns:
        [N, heads * Dv, H, W], query's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape or device is wrong, or there is no position to attend to.
    """
    check_activation("query", query, 4, "[N, heads * Dk, H, W]")
    check_activation("key", key, 3, "[N, P, Dk]")
    check_operand("key", key, query, "query")
    check_activation("value", value, 3, "[N, P, Dv]")
    check_operand("value", value, query, "query")
    if not isinstance(heads, int):
        raise TypeError(f"`heads` must be an int, got {heads!r}")
    if heads < 1:
        raise ValueError(f"`heads` must be positive, got {heads!r}")
    batch, positions, depth = key.shape
    if batch != query.shape[0]:
        raise shape_error("key", f"[{query.shape[0]}, P, Dk]", key)
    if query.shape[1] != heads * depth:
        raise shape_error("query", f"[N, {heads} heads * {depth}, H, W]", query)
    if positions < 1:
        raise shape_error("key", "[N, P, Dk] with P at least 1", key)
    if value.shape[0] != batch or value.shape[1] != positions:
        raise shape_error("value", f"[{batch}, {positions}, Dv]", value)
    if depth < 1:
        raise shape_error("key", "[N, P, Dk] with Dk at least 1", key)
    arguments = (query, key, value, heads, depth**-0.5 if scale is None else float(scale))
    return _run(ops.mqa, mqa_support.BACKENDS, mqa_reference, arguments, operands=(0, 1, 2))


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
    _check_pointwise("weight", weight, x.shape[1])
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
    return _run(ops.head, head_support.BACKENDS, head_reference, arguments, operands=(0, 1, 5, 6))


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


def _check_pointwise(name: str, weight: torch.Tensor, channels: int) -> None:
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise shape_error(name, f"[K, {channels}, 1, 1]", weight)


def _run(
    op: Any,
    backends: Sequence[Backend],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    operands: tuple[int, ...],
) -> Any:
    """`arguments` through the op where a backend can take them, else through the reference.

    `operands` are the positions of what autocast casts.
    """
    if not forward_mode():
        for backend in backends:
            if not backend.reasons(*arguments):
                return op(*arguments)
    first = arguments[0]
    if not under_autocast(first):
        return reference(*arguments)
    # the op's own autocast rule is passed by on this road
    device_type = first.device.type
    dtype = torch.get_autocast_dtype(device_type)
    values = list(arguments)
    for index in operands:
        value = values[index]
        if value is not None and value.dtype != torch.float64:
            values[index] = value.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return reference(*values)
