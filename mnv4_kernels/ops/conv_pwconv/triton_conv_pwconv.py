"""Triton kernel and launcher of `conv_pwconv`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..conv_bn_act import triton_conv_bn_act as dense
from ..gpu import gate
from ..gpu.config import GemmConfig
from ..gpu.device import dot, output_pixels, scale_shift, store_epilogue
from ..gpu.gate import MAX_PAIR_HIDDEN, ConvPairShape, Decision
from ..gpu.launch import (
    SIZES,
    Launch,
    answer,
    cdiv,
    channel_vector,
    dot_precision,
    geometry_constants,
    needs_int64,
    next_power_of_2,
    nhwc,
)
from ..gpu.select import ceilings, conv_pair_config
from ..layout import empty_like_conv, memory_format_of
from ..pwconv_bn_act import triton_pwconv_bn_act as pointwise


@triton.jit(do_not_specialize=SIZES)
def _conv_pwconv_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    conv_ptr,  # [E, kh, kw, C]
    conv_scale_ptr,  # [E] or None
    conv_shift_ptr,  # [E] or None
    w_ptr,  # [K, E]
    scale_ptr,  # [K] or None
    shift_ptr,  # [K] or None
    gamma_ptr,  # [K] or None
    residual_ptr,  # [N, OH, OW, K] or None
    y_ptr,  # [N, OH, OW, K]
    m,
    height,
    width,
    channel_groups,
    hidden_groups,
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
    CONV_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_H: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = ACT(h w^T * scale + shift) * gamma + residual, h = CONV_ACT(conv(x) * conv_scale + conv_shift).

    A program holds all hidden channels of its pixels: h never reaches memory and is computed once.
    """
    channels = channel_groups * VEC_C
    hidden = hidden_groups * VEC_H
    outputs = output_groups * VEC_K
    o_m, o_image, o_oh, o_ow, m_m = output_pixels(tl.program_id(0), m, out_h, out_w, INT64, BLOCK_M)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < hidden
    o_k = tl.arange(0, BLOCK_K)
    o_ih = o_oh * STRIDE_H - PAD_T
    o_iw = o_ow * STRIDE_W - PAD_L
    p_image = x_ptr + o_image * height * width * channels
    p_conv = conv_ptr + o_h[None, :] * (KERNEL_H * KERNEL_W * channels) + o_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    n_k = tl.cdiv(channels, BLOCK_K)
    for i_step in range(KERNEL_H * KERNEL_W * n_k):
        tap = i_step // n_k
        c0 = (i_step % n_k) * BLOCK_K
        ih = o_ih + (tap // KERNEL_W) * DILATION_H
        iw = o_iw + (tap % KERNEL_W) * DILATION_W
        m_x = m_m & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        m_k = o_k < channels - c0
        p_x = p_image[:, None] + ((ih * width + iw) * channels)[:, None] + (c0 + o_k)[None, :]
        b_x = tl.load(p_x, mask=m_x[:, None] & m_k[None, :], other=0.0)
        b_conv = tl.load(p_conv + (tap * channels + c0), mask=m_h[None, :] & m_k[:, None], other=0.0)
        acc = dot(b_x, b_conv, acc, PRECISION)
    b_h = scale_shift(acc, conv_scale_ptr, conv_shift_ptr, o_h, m_h, CONV_ACT).to(x_ptr.dtype.element_ty)
    for n0 in range(0, outputs, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        m_w = (o_n < outputs)[None, :] & m_h[:, None]
        b_w = tl.load(w_ptr + o_n[None, :] * hidden + o_h[:, None], mask=m_w, other=0.0)
        b_y = dot(b_h, b_w, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        store_epilogue(b_y, scale_ptr, shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_m * outputs, m_m, n0, outputs, ACT)


def decide(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_scale: torch.Tensor | None,
    conv_shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    conv_act: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Decision:
    """What the gate picks for this call; it takes 'same' padding for granted, which decides no plan."""
    outputs, hidden = weight.shape[:2]
    shape = ConvPairShape(
        x.shape[0], x.shape[1], hidden, outputs, x.shape[2], x.shape[3], conv_weight.shape[2], stride[0],
        residual is not None,
    )  # fmt: skip
    return gate.conv_pair(shape, x.element_size(), ceilings(x.device))


def build(
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
    config: GemmConfig | None = None,
    int64: bool | None = None,
    *,
    fuse: bool = True,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it.

    One launch, unless `fuse` is False or the hidden rows are too wide for a program.
    """
    outputs, hidden = weight.shape[:2]
    if hidden > MAX_PAIR_HIDDEN or not fuse:
        h, launches = dense.build(
            x, conv_weight, conv_scale, conv_shift, stride, padding, dilation, conv_act, int64=int64
        )
        y, more = pointwise.build(h, weight, scale, shift, act, gamma, residual, int64=int64)
        return y, launches + more
    x = nhwc(x)
    channels = x.shape[1]
    kernel_size = (conv_weight.shape[2], conv_weight.shape[3])
    y = empty_like_conv(x, outputs, kernel_size, stride, padding, dilation, torch.channels_last)
    if y.numel() == 0:
        return y, []
    batch, _, out_h, out_w = y.shape
    m = batch * out_h * out_w
    config = config or conv_pair_config(m, hidden, outputs, channels, x.dtype, x.device)
    vectors = (channel_vector(channels), channel_vector(hidden), channel_vector(outputs))
    residual = None if residual is None else nhwc(residual)
    launch = Launch(
        kernel=_conv_pwconv_fwd_kernel,
        grid=(cdiv(m, config.block_m),),
        arguments=(
            x, conv_weight.permute(0, 2, 3, 1).contiguous(), conv_scale, conv_shift, weight.flatten(1).contiguous(),
            scale, shift, gamma, residual, y, m, x.shape[2], x.shape[3],
            channels // vectors[0], hidden // vectors[1], outputs // vectors[2], out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel_size, stride, padding, dilation),
            "CONV_ACT": conv_act,
            "ACT": act,
            "PRECISION": dot_precision(x),
            "VEC_C": vectors[0],
            "VEC_H": vectors[1],
            "VEC_K": vectors[2],
            "INT64": needs_int64(x, y) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            # a program holds the whole hidden tensor of its pixels, whatever a config says
            "BLOCK_H": max(16, next_power_of_2(hidden)),
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def conv_pwconv(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others, fuse=decide(x, *others).plan.fuse_mid), memory_format_of(x))
