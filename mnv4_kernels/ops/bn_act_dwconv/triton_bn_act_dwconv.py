"""Triton kernel and launcher of `bn_act_dwconv`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..bn_act_conv.reference import Moments, moments_like
from ..gpu.config import DepthwiseConfig
from ..gpu.depthwise import depthwise_rows, output_columns
from ..gpu.launch import SIZES, Launch, answer, cdiv, channel_vector, geometry_constants, needs_int64, nhwc, tap_major
from ..gpu.normalise import normalisation
from ..gpu.reduction import join_moments, store_moments
from ..gpu.select import training_depthwise_config
from ..layout import empty_like_conv, memory_format_of
from .reference import reference


@triton.jit(do_not_specialize=SIZES)
def _bn_act_dwconv_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w_ptr,  # [kh, kw, C]
    z_ptr,  # [N, OH, OW, C]
    partial_ptr,  # [tiles, 3, C] or None
    eps,
    columns,
    n_strips,
    height,
    width,
    channel_groups,
    out_h,
    out_w,
    PAD_T: tl.constexpr,
    PAD_L: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z = dwconv(ACT(bn(x)), w), and the moments of the rounded z in this tile."""
    channels = channel_groups * VEC
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c
    i_n, i_strip, o_ow, m_p = output_columns(i_tile, columns, n_strips, out_w, INT64, BLOCK_P)
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_oh = i_strip * ROWS
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    acc = depthwise_rows(
        x_ptr, w_ptr, i_n, o_oh, o_ow, m_p, o_c, m_c, height, width, channels,
        PAD_T, PAD_L, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ROWS, BLOCK_P, BLOCK_C,
        b_mean, b_slope, b_beta, ACT,
    )  # fmt: skip
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    for row in tl.static_range(ROWS):
        oh = o_oh + row
        m_z = (m_p & (oh < out_h))[:, None] & m_c[None, :]
        b_z = acc[row].to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + (((i_n * out_h + oh) * out_w + o_ow) * channels)[:, None] + o_c[None, :], b_z, mask=m_z)
        b_sum += tl.sum(tl.where(m_z, b_z.to(tl.float32), 0.0), 0)
        count += tl.sum((m_p & (oh < out_h)).to(tl.float32), 0)
    if partial_ptr is not None:
        # about the tile's own mean: a mean far from zero costs no digits
        b_average = b_sum / count
        b_square = tl.zeros([BLOCK_C], tl.float32)
        for row in tl.static_range(ROWS):
            m_z = (m_p & (o_oh + row < out_h))[:, None] & m_c[None, :]
            b_apart = tl.where(m_z, acc[row].to(z_ptr.dtype.element_ty).to(tl.float32) - b_average[None, :], 0.0)
            b_square += tl.sum(b_apart * b_apart, 0)
        store_moments(partial_ptr, i_tile.to(tl.int64), o_c, m_c, channels, b_average, b_square, count)


def build(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [C, 1, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    moments: bool,
    config: DepthwiseConfig | None = None,
    int64: bool | None = None,
) -> tuple[Moments, list[Launch]]:
    """(z in channels_last memory, mean, variance), not yet written, and the launches that write them."""
    x = nhwc(x)
    kernel = (weight.shape[2], weight.shape[3])
    z = empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, torch.channels_last)
    batch, channels, out_h, out_w = z.shape
    config = config or training_depthwise_config(tuple(z.shape), kernel, (stride[0], stride[1]), x.dtype, x.device)
    vector = channel_vector(channels)
    n_strips = cdiv(out_h, config.rows)
    columns = batch * n_strips * out_w
    tiles = cdiv(columns, config.columns)
    count = channels if moments else 0
    z_mean, z_var = moments_like(x, count), moments_like(x, count)
    partial = x.new_empty((tiles, 3, channels), dtype=torch.float32) if moments else None
    launch = Launch(
        kernel=_bn_act_dwconv_fwd_kernel,
        grid=(tiles * cdiv(channels, config.channels),),
        arguments=(
            x, mean, var, gamma, beta, tap_major(weight), z, partial, eps,
            columns, n_strips, x.shape[2], x.shape[3], channels // vector, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel, stride, padding, dilation),
            "ACT": act,
            "VEC": vector,
            "INT64": needs_int64(x, z) if int64 is None else int64,
            "ROWS": config.rows,
            "BLOCK_P": config.columns,
            "BLOCK_C": config.channels,
        },
        config=config,
    )  # fmt: skip
    joins = [] if partial is None else join_moments(partial, z_mean, z_var)
    return (z, z_mean, z_var), [launch, *joins]


def bn_act_dwconv(x: torch.Tensor, *others: Any) -> Moments:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    if x.numel() == 0:
        return reference(x, *others)
    return answer(build(x, *others), memory_format_of(x))
