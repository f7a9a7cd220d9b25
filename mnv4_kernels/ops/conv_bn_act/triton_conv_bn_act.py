"""Triton kernels and launcher of `conv_bn_act`: an implicit GEMM, and one for images of a few channels."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.config import GemmConfig
from ..gpu.device import dot, grouped_tile, output_pixels, store_epilogue
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
from ..gpu.select import gemm_config
from ..gpu.taps import GATHERED_CHANNELS
from ..layout import empty_like_conv
from .reference import output_format


@triton.jit(do_not_specialize=SIZES)
def _conv_bn_act_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [K, kh, kw, C]
    scale_ptr,  # [K] or None
    shift_ptr,  # [K] or None
    y_ptr,  # [N, OH, OW, K]
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
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = ACT(conv(x, w) * scale + shift) as a product over (tap, channel block), accumulated in float32."""
    channels = channel_groups * VEC_C
    outputs = output_groups * VEC_K
    i_m, i_n = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP_M)
    o_m, o_image, o_oh, o_ow, m_m = output_pixels(i_m, m, out_h, out_w, INT64, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    o_k = tl.arange(0, BLOCK_K)
    o_ih = o_oh * STRIDE_H - PAD_T
    o_iw = o_ow * STRIDE_W - PAD_L
    p_image = x_ptr + o_image * height * width * channels
    p_w = w_ptr + o_n[None, :] * (KERNEL_H * KERNEL_W * channels) + o_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    n_k = tl.cdiv(channels, BLOCK_K)
    # taps and channel blocks are one loop, so that the software pipeline runs through all of them
    for i_step in range(KERNEL_H * KERNEL_W * n_k):
        tap = i_step // n_k
        c0 = (i_step % n_k) * BLOCK_K
        ih = o_ih + (tap // KERNEL_W) * DILATION_H
        iw = o_iw + (tap % KERNEL_W) * DILATION_W
        m_x = m_m & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        m_k = o_k < channels - c0
        p_x = p_image[:, None] + ((ih * width + iw) * channels)[:, None] + (c0 + o_k)[None, :]
        b_x = tl.load(p_x, mask=m_x[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + (tap * channels + c0), mask=m_n[None, :] & m_k[:, None], other=0.0)
        acc = dot(b_x, b_w, acc, PRECISION)
    store_epilogue(acc, scale_ptr, shift_ptr, None, None, y_ptr, o_m * outputs, m_m, i_n * BLOCK_N, outputs, ACT)


@triton.jit(do_not_specialize=SIZES)
def _conv_bn_act_gathered_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    w_ptr,  # [K, kh, kw, C]
    scale_ptr,  # [K] or None
    shift_ptr,  # [K] or None
    y_ptr,  # [N, OH, OW, K]
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    m,
    height,
    width,
    output_groups,
    out_h,
    out_w,
    CHANNELS: tl.constexpr,
    PAD_T: tl.constexpr,
    PAD_L: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The same of an image in any layout: the reduction axis is (ky, kx, c), gathered element by element."""
    outputs = output_groups * VEC_K
    i_m, i_n = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP_M)
    o_m, o_image, o_oh, o_ow, m_m = output_pixels(i_m, m, out_h, out_w, INT64, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    REDUCTION: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    p_image = x_ptr + o_image * stride_xn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, REDUCTION, BLOCK_K):
        o_k = k0 + tl.arange(0, BLOCK_K)
        m_k = o_k < REDUCTION
        tap = o_k // CHANNELS
        ih = (o_oh * STRIDE_H - PAD_T)[:, None] + ((tap // KERNEL_W) * DILATION_H)[None, :]
        iw = (o_ow * STRIDE_W - PAD_L)[:, None] + ((tap % KERNEL_W) * DILATION_W)[None, :]
        m_x = m_m[:, None] & m_k[None, :] & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        p_x = p_image[:, None] + ih * stride_xh + iw * stride_xw + ((o_k % CHANNELS) * stride_xc)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
        b_w = tl.load(w_ptr + o_n[None, :] * REDUCTION + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        acc = dot(b_x, b_w, acc, PRECISION)
    store_epilogue(acc, scale_ptr, shift_ptr, None, None, y_ptr, o_m * outputs, m_m, i_n * BLOCK_N, outputs, ACT)


def build(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, kh, kw]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    act: str,
    channels_last: bool = True,
    packed: torch.Tensor | None = None,
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it.

    A weight in channels_last memory is read where it lies; another is copied by each call.
    """
    kernel_size = (weight.shape[2], weight.shape[3])
    y = empty_like_conv(x, weight.shape[0], kernel_size, stride, padding, dilation, torch.channels_last)
    batch, outputs, out_h, out_w = y.shape
    if y.numel() == 0:
        return y, []
    channels = x.shape[1]
    gathered = channels < GATHERED_CHANNELS
    m, taps = batch * out_h * out_w, kernel_size[0] * kernel_size[1]
    reduction = (taps * channels, 1) if gathered else (channels, taps)
    config = config or gemm_config("conv_bn_act", m, outputs, reduction[0], x.dtype, x.device, reduction[1])
    vector_k = channel_vector(outputs)
    constants = {
        **geometry_constants(kernel_size, stride, padding, dilation),
        "ACT": act,
        "PRECISION": dot_precision(x),
        "VEC_K": vector_k,
        "INT64": needs_int64(x, y) if int64 is None else int64,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    # [K, kh, kw, C]
    weight = weight.permute(0, 2, 3, 1).contiguous()
    size = (m, x.shape[2], x.shape[3])
    if gathered:
        kernel = _conv_bn_act_gathered_fwd_kernel
        arguments = (x, weight, scale, shift, y, *x.stride(), *size, outputs // vector_k, out_h, out_w)
        constants |= {"CHANNELS": channels}
    else:
        kernel = _conv_bn_act_fwd_kernel
        vector_c = channel_vector(channels)
        x = nhwc(x)
        arguments = (x, weight, scale, shift, y, *size, channels // vector_c, outputs // vector_k, out_h, out_w)
        constants |= {"VEC_C": vector_c}
    grid = (cdiv(m, config.block_m) * cdiv(outputs, config.block_n),)
    return y, [Launch(kernel, grid, arguments, constants, config)]


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    act: str,
    channels_last: bool,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """CUDA implementation of the op; an NCHW image is read as it lies."""
    return answer(build(x, weight, scale, shift, stride, padding, dilation, act), output_format(x, channels_last))
