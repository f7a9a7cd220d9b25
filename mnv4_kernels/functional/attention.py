"""Multi-query attention: its keys and values, the attention itself, and that between its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from .._arguments import (
    Padding,
    check_activation,
    check_channels,
    check_depthwise,
    check_operand,
    check_packed,
    check_pointwise,
    check_residual,
    geometry,
    shape_error,
)
from ..ops.kv_downsample import support as kv_support
from ..ops.kv_downsample.reference import reference as kv_reference
from ..ops.mobile_attention import support as block_support
from ..ops.mobile_attention.reference import reference as block_reference
from ..ops.mqa import support as mqa_support
from ..ops.mqa.reference import reference as mqa_reference
from ..ops.mqa_projected import support as projected_support
from ..ops.mqa_projected.reference import reference as projected_reference
from ._run import run


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
    key = (key_down, key_scale, key_shift, key_project)
    value = (value_down, value_scale, value_shift, value_project)
    form = _checked_paths(x, key, value, (stride, padding, dilation))
    check_packed("packed", packed, *(w for w in (key_down, key_project, value_down, value_project) if w is not None))
    arguments = (x, *key, *value, *form, packed)
    return run(ops.kv_downsample, kv_support.BACKENDS, kv_reference, arguments, operands=(0, 1, 4, 5, 8))


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
    _check_keys(key, value, query, "query", heads)
    depth = key.shape[2]
    if query.shape[1] != heads * depth:
        raise shape_error("query", f"[N, {heads} heads * {depth}, H, W]", query)
    arguments = (query, key, value, heads, depth**-0.5 if scale is None else float(scale))
    return run(ops.mqa, mqa_support.BACKENDS, mqa_reference, arguments, operands=(0, 1, 2))


def mqa_projected(
    x: torch.Tensor,  # [N, C, H, W]
    query_weight: torch.Tensor,  # [heads * Dk, C, 1, 1]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    output_weight: torch.Tensor,  # [K, heads * Dv, 1, 1]
    *,
    heads: int,
    scale: float | None = None,
    query_scale: torch.Tensor | None = None,  # [heads * Dk]
    query_shift: torch.Tensor | None = None,  # [heads * Dk]
    gamma: torch.Tensor | None = None,  # [K]
    residual: torch.Tensor | None = None,  # [N, K, H, W]
) -> torch.Tensor:
    """conv1x1(mqa(conv1x1(x, query_weight) * query_scale + query_shift, key, value), output_weight) * gamma + residual.

    A `MobileAttention` block behind its keys and values (MobileNet-V4 paper, section 3.2, equation 1; timm's
    `MultiQueryAttention2d.query`, attention and `.output`, and `MobileAttention.layer_scale`). Queries and attended
    values are rounded to x's dtype in between; scores, softmax and sums are float32. Where a cost model says so, a GPU
    computes all of it in one launch (`mnv4_kernels.explain`). The CPU has no kernel of it: the reference answers.

    Args:
        x: [N, C, H, W].
        query_weight: [heads * Dk, C, 1, 1], x's dtype.
        key: [N, P, Dk], x's dtype; `kv_downsample` makes it.
        value: [N, P, Dv], x's dtype.
        output_weight: [K, heads * Dv, 1, 1], x's dtype.
        heads: number of query heads.
        scale: of the scores; None is Dk ** -0.5.
        query_scale: [heads * Dk], float32; None is 1.
        query_shift: [heads * Dk], float32; None is 0.
        gamma: [K], float32: the layer scale.
        residual: [N, K, H, W], x's dtype, any memory format; added in float32 before the rounding.

    Returns:
        [N, K, H, W], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape or device is wrong, or there is no position to attend to.
    """
    check_activation("x", x)
    check_operand("query_weight", query_weight, x)
    check_pointwise("query_weight", query_weight, x.shape[1])
    _check_keys(key, value, x, "x", heads)
    depth = key.shape[2]
    if query_weight.shape[0] != heads * depth:
        raise shape_error("query_weight", f"[{heads} heads * {depth}, {x.shape[1]}, 1, 1]", query_weight)
    check_operand("output_weight", output_weight, x)
    check_pointwise("output_weight", output_weight, heads * value.shape[2])
    check_channels("query_scale", query_scale, heads * depth, x)
    check_channels("query_shift", query_shift, heads * depth, x)
    check_channels("gamma", gamma, output_weight.shape[0], x)
    check_residual(residual, (x.shape[0], output_weight.shape[0], x.shape[2], x.shape[3]), x)
    paths = (query_weight, query_scale, query_shift, key, value, output_weight, gamma, residual)
    arguments = (x, *paths, heads, depth**-0.5 if scale is None else float(scale))
    operands = (0, 1, 4, 5, 6, 8)
    return run(ops.mqa_projected, projected_support.BACKENDS, projected_reference, arguments, operands)


def mobile_attention(
    x: torch.Tensor,  # [N, C, H, W]
    query_weight: torch.Tensor,  # [heads * Dk, C, 1, 1]
    key_project: torch.Tensor,  # [Dk, C, 1, 1]
    value_project: torch.Tensor,  # [Dv, C, 1, 1]
    output_weight: torch.Tensor,  # [K, heads * Dv, 1, 1]
    *,
    heads: int,
    scale: float | None = None,
    norm_scale: torch.Tensor | None = None,  # [C]
    norm_shift: torch.Tensor | None = None,  # [C]
    query_shift: torch.Tensor | None = None,  # [heads * Dk]
    key_down: torch.Tensor | None = None,  # [C, 1, kh, kw]
    key_scale: torch.Tensor | None = None,  # [C]
    key_shift: torch.Tensor | None = None,  # [C]
    value_down: torch.Tensor | None = None,  # [C, 1, kh, kw]
    value_scale: torch.Tensor | None = None,  # [C]
    value_shift: torch.Tensor | None = None,  # [C]
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    output_shift: torch.Tensor | None = None,  # [K]
    gamma: torch.Tensor | None = None,  # [K]
    residual: bool = False,
) -> torch.Tensor:
    """A whole MobileAttention block in eval mode: (conv1x1(attention, output_weight) + output_shift) * gamma + x.

    Queries, keys and values read n = x * norm_scale + norm_shift: conv1x1(n, query_weight) + query_shift, and
    `kv_downsample` of n (MobileNet-V4 paper, section 3.2; timm's `MobileAttention`). On a CPU it is one program of the
    engine, with the scales folded into the weights before these are rounded to x's dtype; `scale` must then be the
    default.

    Args:
        x: [N, C, H, W].
        query_weight: [heads * Dk, C, 1, 1], x's dtype.
        key_project: [Dk, C, 1, 1], x's dtype.
        value_project: [Dv, C, 1, 1], x's dtype.
        output_weight: [K, heads * Dv, 1, 1], x's dtype.
        heads: number of query heads.
        scale: of the scores; None is Dk ** -0.5.
        norm_scale: [C], float32: of the BatchNorm before the attention; None is 1.
        norm_shift: [C], float32; None is 0.
        query_shift: [heads * Dk], float32; None is 0.
        key_down: [C, 1, kh, kw], x's dtype, or None: no downsampling, given if and only if `value_down` is.
        key_scale: [C], float32; None is 1.
        key_shift: [C], float32; None is 0.
        value_down: as `key_down`, of the same kernel size.
        value_scale: [C], float32; None is 1.
        value_shift: [C], float32; None is 0.
        stride: of the depthwise convolutions, int or (vertical, horizontal).
        padding: of the depthwise convolutions, as in `dwconv_bn_act`.
        dilation: of the depthwise convolutions, int or (vertical, horizontal).
        output_shift: [K], float32; None is 0.
        gamma: [K], float32: the layer scale.
        residual: add x, which must have the result's channels.

    Returns:
        [N, K, H, W], x's dtype and memory format.

    Raises:
        TypeError: an argument's type or dtype is wrong.
        ValueError: a rank, shape, device or geometry is wrong, or there is nothing that x could be added to.
    """
    check_activation("x", x)
    channels = x.shape[1]
    key = (key_down, key_scale, key_shift, key_project)
    value = (value_down, value_scale, value_shift, value_project)
    form = _checked_paths(x, key, value, (stride, padding, dilation))
    _check_heads(heads)
    depth, outputs = key_project.shape[0], output_weight.shape[0]
    check_operand("query_weight", query_weight, x)
    check_pointwise("query_weight", query_weight, channels)
    if query_weight.shape[0] != heads * depth:
        raise shape_error("query_weight", f"[{heads} heads * {depth}, {channels}, 1, 1]", query_weight)
    check_operand("output_weight", output_weight, x)
    check_pointwise("output_weight", output_weight, heads * value_project.shape[0])
    for name, vector, size in (
        ("norm_scale", norm_scale, channels),
        ("norm_shift", norm_shift, channels),
        ("query_shift", query_shift, heads * depth),
        ("output_shift", output_shift, outputs),
        ("gamma", gamma, outputs),
    ):
        check_channels(name, vector, size, x)
    if residual and outputs != channels:
        raise ValueError(f"`residual` needs a result of x's {channels} channels, got {outputs}")
    scale = depth**-0.5 if scale is None else float(scale)
    before = (norm_scale, norm_shift, query_weight, query_shift)
    after = (output_weight, output_shift, gamma, heads, scale, bool(residual))
    arguments = (x, *before, *key, *value, *form, *after)
    operands = (0, 3, 5, 8, 9, 12, 16)
    return run(ops.mobile_attention, block_support.BACKENDS, block_reference, arguments, operands)


def _checked_paths(
    x: torch.Tensor,
    key: tuple[Any, ...],  # depthwise weight, scale, shift, projection
    value: tuple[Any, ...],
    form: tuple[Any, ...],  # stride, padding, dilation
) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) as the ops take them, once keys' and values' tensors are as they must be."""
    channels = x.shape[1]
    key_down, value_down = key[0], value[0]
    for name, (_, scale, shift, project) in (("key", key), ("value", value)):
        check_operand(f"{name}_project", project, x)
        check_pointwise(f"{name}_project", project, channels)
        check_channels(f"{name}_scale", scale, channels, x)
        check_channels(f"{name}_shift", shift, channels, x)
    if (key_down is None) != (value_down is None):
        absent = "key_down" if key_down is None else "value_down"
        raise ValueError(f"`key_down` and `value_down` must be given together, got `{absent}` = None")
    if key_down is None:
        return [1, 1], [0, 0, 0, 0], [1, 1]
    for name, down in (("key_down", key_down), ("value_down", value_down)):
        check_operand(name, down, x)
        check_depthwise(name, down, channels)
    if value_down.shape != key_down.shape:
        raise shape_error("value_down", f"{list(key_down.shape)}, as `key_down`", value_down)
    return geometry(x.shape[2:], key_down, *form, weight_name="key_down")


def _check_keys(key: torch.Tensor, value: torch.Tensor, x: torch.Tensor, x_name: str, heads: int) -> None:
    """`key` [N, P, Dk] and `value` [N, P, Dv] go with `x` [N, ...], and `heads` is a positive int."""
    check_activation("key", key, 3, "[N, P, Dk]")
    check_operand("key", key, x, x_name)
    check_activation("value", value, 3, "[N, P, Dv]")
    check_operand("value", value, x, x_name)
    _check_heads(heads)
    batch, positions, depth = key.shape
    if batch != x.shape[0]:
        raise shape_error("key", f"[{x.shape[0]}, P, Dk]", key)
    if positions < 1:
        raise shape_error("key", "[N, P, Dk] with P at least 1", key)
    if depth < 1:
        raise shape_error("key", "[N, P, Dk] with Dk at least 1", key)
    if value.shape[0] != batch or value.shape[1] != positions:
        raise shape_error("value", f"[{batch}, {positions}, Dv]", value)


def _check_heads(heads: int) -> None:
    if not isinstance(heads, int):
        raise TypeError(f"`heads` must be an int, got {heads!r}")
    if heads < 1:
        raise ValueError(f"`heads` must be positive, got {heads!r}")
