"""Triton kernel and launcher of `bn_act_conv`, and of `bn_act_pwconv`, which is one tap of it."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..conv_bn_act.reference import output_format
from ..gpu.config import GemmConfig
from ..gpu.device import dot, grouped_tile, output_pixels
from ..gpu.launch import (
    SIZES,
    Launch,
    answer,
    cdiv,
    channel_vector,
    dot_precision,
    geometry_constants,
    needs_int64,
    nhwc,
)
from ..gpu.normalise import normalisation
from ..gpu.reduction import join_moments, store_tile_moments
from ..gpu.select import training_gemm_config
from ..gpu.taps import GATHERED_CHANNELS, activated_tile, reduction_columns
from ..layout import empty_like_conv
from .reference import Moments, moments_like, reference


@triton.jit(do_not_specialize=SIZES)
def _bn_act_conv_fwd_kernel(
    x_ptr,  # [N, H, W, C]; GATHERED: in any strides
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w_ptr,  # [K, kh, kw, C]
    z_ptr,  # [N, OH, OW, K]
    partial_ptr,  # [tiles, 3, K] or None
    eps,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    m,
    height,
    width,
    channel_groups,
    output_groups,
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
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """z = conv(ACT(bn(x)), w), accumulated in float32, and the moments of the rounded z in this tile."""
    channels = channel_groups * VEC_C
    outputs = output_groups * VEC_K
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_m, i_n = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP_M)
    o_m, o_image, o_oh, o_ow, m_m = output_pixels(i_m, m, out_h, out_w, INT64, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    p_w = w_ptr + o_n[None, :] * (TAPS * channels)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    steps = tl.cdiv(TAPS * channels, BLOCK_K) if GATHERED else TAPS * tl.cdiv(channels, BLOCK_K)
    # taps and channel blocks are one loop, so that the software pipeline runs through all of them
    for i_step in range(steps):
        tap, o_c, m_k, o_w = reduction_columns(i_step, channels, TAPS, GATHERED, BLOCK_K)
        b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_k)
        b_a = activated_tile(
            x_ptr, mean_ptr, b_mean, b_slope, b_beta, stride_xn, stride_xc, stride_xh, stride_xw,
            o_image, o_oh * STRIDE_H - PAD_T, o_ow * STRIDE_W - PAD_L, m_m, tap, o_c, m_k, height, width, channels,
            KERNEL_W, DILATION_H, DILATION_W, ACT, GATHERED,
        )  # fmt: skip
        b_w = tl.load(p_w + o_w[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        acc = dot(b_a, b_w, acc, PRECISION)
    b_z = acc.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + (o_m * outputs)[:, None] + o_n[None, :], b_z, mask=m_m[:, None] & m_n[None, :])
    if partial_ptr is not None:
        store_tile_moments(partial_ptr, i_m.to(tl.int64), b_z.to(tl.float32), m_m, o_n, m_n, outputs)


def build(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    moments: bool,
    channels_last: bool = False,
    config: GemmConfig | None = None,
    int64: bool | None = None,
    op: str = "bn_act_conv",
) -> tuple[Moments, list[Launch]]:
    """(z in channels_last memory, mean, variance), not yet written, and the launches that write them.

    A weight in channels_last memory is read where it lies; another is copied by each call.
    """
    kernel = (weight.shape[2], weight.shape[3])
    z = empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, torch.channels_last)
    batch, outputs, out_h, out_w = z.shape
    channels, taps = x.shape[1], kernel[0] * kernel[1]
    gathered = channels < GATHERED_CHANNELS and taps > 1
    x = x if gathered else nhwc(x)
    m = batch * out_h * out_w
    reduction = (taps * channels, 1) if gathered else (channels, taps)
    config = config or training_gemm_config(op, m, outputs, reduction[0], x.dtype, x.device, reduction[1])
    vector_c, vector_k = channel_vector(channels), channel_vector(outputs)
    count = outputs if moments else 0
    z_mean, z_var = moments_like(x, count), moments_like(x, count)
    tiles = cdiv(m, config.block_m)
    partial = x.new_empty((tiles, 3, outputs), dtype=torch.float32) if moments else None
    launch = Launch(
        kernel=_bn_act_conv_fwd_kernel,
        grid=(tiles * cdiv(outputs, config.block_n),),
        arguments=(
            x, mean, var, gamma, beta, weight.permute(0, 2, 3, 1).contiguous(), z, partial, eps, *x.stride(),
            m, x.shape[2], x.shape[3], channels // vector_c, outputs // vector_k, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel, stride, padding, dilation),
            "ACT": act,
            "GATHERED": gathered,
            "PRECISION": dot_precision(x),
            "VEC_C": vector_c,
            "VEC_K": vector_k,
            "INT64": needs_int64(x, z) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config=config,
    )  # fmt: skip
    joins = [] if partial is None else join_moments(partial, z_mean, z_var)
    return (z, z_mean, z_var), [launch, *joins]


def bn_act_conv(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    act: str,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    moments: bool,
    channels_last: bool = False,
) -> Moments:
    """CUDA implementation of the op; an NCHW image of a few channels is read as it lies, another map converted."""
    arguments = (x, mean, var, gamma, beta, eps, act, weight, stride, padding, dilation, moments, channels_last)
    if x.numel() == 0:
        return reference(*arguments)
    return answer(build(*arguments), output_format(x, channels_last))
