"""Triton kernel and launcher of `dwconv_pwconv`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dwconv_bn_act import triton_dwconv_bn_act as depthwise
from ..gpu import gate
from ..gpu.config import DepthwiseGemmConfig
from ..gpu.depthwise import depthwise_rows, output_columns
from ..gpu.device import dot, scale_shift, store_epilogue
from ..gpu.gate import Decision, DepthwisePairShape
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
    tap_major,
)
from ..gpu.select import ceilings, depthwise_gemm_config
from ..layout import conv_output_size, empty_like_conv, memory_format_of
from ..pwconv_bn_act import triton_pwconv_bn_act as pointwise


@triton.jit(do_not_specialize=SIZES)
def _dwconv_pwconv_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    dw_ptr,  # [kh, kw, C]
    dw_scale_ptr,  # [C] or None
    dw_shift_ptr,  # [C] or None
    w_ptr,  # [K, C]
    scale_ptr,  # [K] or None
    shift_ptr,  # [K] or None
    gamma_ptr,  # [K] or None
    residual_ptr,  # [N, OH, OW, K] or None
    y_ptr,  # [N, OH, OW, K]
    columns,
    n_strips,
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
    DW_ACT: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = ACT(h w^T * scale + shift) * gamma + residual, h = DW_ACT(dwconv(x) * dw_scale + dw_shift).

    h never reaches memory: each step makes BLOCK_K channels of ROWS output rows in registers, and each
    row is the A operand of one product with the same weight tile.
    """
    channels = channel_groups * VEC_C
    outputs = output_groups * VEC_K
    n_n = tl.cdiv(outputs, BLOCK_N)
    i_n, i_strip, o_ow, m_p = output_columns(tl.program_id(0) // n_n, columns, n_strips, out_w, INT64, BLOCK_P)
    i_block = tl.program_id(0) % n_n
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    o_oh = i_strip * ROWS
    acc = (tl.zeros([BLOCK_P, BLOCK_N], tl.float32),) * ROWS
    for k0 in range(0, channels, BLOCK_K):
        o_c = k0 + tl.arange(0, BLOCK_K)
        m_c = o_c < channels
        # asked for before the depthwise, so that it arrives meanwhile
        b_w = tl.load(w_ptr + o_n[None, :] * channels + o_c[:, None], mask=m_n[None, :] & m_c[:, None], other=0.0)
        b_h = depthwise_rows(
            x_ptr, dw_ptr, i_n, o_oh, o_ow, m_p, o_c, m_c, height, width, channels,
            PAD_T, PAD_L, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ROWS, BLOCK_P, BLOCK_K,
            None, None, None, "none",
        )  # fmt: skip
        summed = ()
        for row in tl.static_range(ROWS):
            # beyond the last channel the weight tile is zero, so whatever DW_ACT makes of the padding is harmless
            b_row = scale_shift(b_h[row], dw_scale_ptr, dw_shift_ptr, o_c, m_c, DW_ACT).to(x_ptr.dtype.element_ty)
            summed += (dot(b_row, b_w, acc[row], PRECISION),)
        acc = summed
    for row in tl.static_range(ROWS):
        oh = o_oh + row
        o_row = ((i_n * out_h + oh) * out_w + o_ow) * outputs
        m_row = m_p & (oh < out_h)
        store_epilogue(
            acc[row],
            scale_ptr,
            shift_ptr,
            gamma_ptr,
            residual_ptr,
            y_ptr,
            o_row,
            m_row,
            i_block * BLOCK_N,
            outputs,
            ACT,
        )


def decide(
    x: torch.Tensor,
    dw_weight: torch.Tensor,
    dw_scale: torch.Tensor | None,
    dw_shift: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dw_act: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> Decision:
    """What the gate picks for this call."""
    kernel = (dw_weight.shape[2], dw_weight.shape[3])
    height = conv_output_size(x.shape[2], kernel[0], stride[0], padding[0], padding[1], dilation[0])
    width = conv_output_size(x.shape[3], kernel[1], stride[1], padding[2], padding[3], dilation[1])
    shape = DepthwisePairShape(
        x.shape[0], x.shape[1], weight.shape[0], height, width, kernel[0], stride[0], residual is not None
    )
    return gate.depthwise_pair(shape, x.element_size(), ceilings(x.device))


def build(
    x: torch.Tensor,  # [N, C, H, W]
    dw_weight: torch.Tensor,  # [C, 1, kh, kw]
    dw_scale: torch.Tensor | None,  # [C]
    dw_shift: torch.Tensor | None,  # [C]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    dw_act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    act: str,
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, OH, OW]
    config: DepthwiseGemmConfig | None = None,
    int64: bool | None = None,
    out: torch.Tensor | None = None,
    *,
    fuse: bool = True,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, `out` or new, in channels_last memory and not yet written, and the launches that write it.

    One launch, or two where `fuse` is False.
    """
    if not fuse:
        first = (dw_scale, dw_shift, stride, padding, dilation, dw_act)
        h, launches = depthwise.build(x, dw_weight, *first, int64=int64)
        y, more = pointwise.build(h, weight, scale, shift, act, gamma, residual, int64=int64, out=out)
        return y, launches + more
    x = nhwc(x)
    channels = x.shape[1]
    kernel_size = (dw_weight.shape[2], dw_weight.shape[3])
    y = out
    if y is None:
        y = empty_like_conv(x, weight.shape[0], kernel_size, stride, padding, dilation, torch.channels_last)
    batch, outputs, out_h, out_w = y.shape
    if y.numel() == 0:
        return y, []
    hidden = (batch, channels, out_h, out_w)
    config = config or depthwise_gemm_config(
        "dwconv_pwconv", hidden, outputs, kernel_size, (stride[0], stride[1]), x.dtype, x.device
    )
    vector_c, vector_k = channel_vector(channels), channel_vector(outputs)
    n_strips = cdiv(out_h, config.rows)
    columns = batch * n_strips * out_w
    residual = None if residual is None else nhwc(residual)
    launch = Launch(
        kernel=_dwconv_pwconv_fwd_kernel,
        grid=(cdiv(columns, config.columns) * cdiv(outputs, config.block_n),),
        arguments=(
            x, tap_major(dw_weight), dw_scale, dw_shift, weight.flatten(1).contiguous(), scale, shift, gamma, residual,
            y, columns, n_strips, x.shape[2], x.shape[3], channels // vector_c, outputs // vector_k, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel_size, stride, padding, dilation),
            "DW_ACT": dw_act,
            "ACT": act,
            "PRECISION": dot_precision(x),
            "VEC_C": vector_c,
            "VEC_K": vector_k,
            "INT64": needs_int64(x, y) if int64 is None else int64,
            "ROWS": config.rows,
            "BLOCK_P": config.columns,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def dwconv_pwconv(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others, fuse=decide(x, *others).plan.fuse_mid), memory_format_of(x))
