"""Triton kernel and launcher of `dwconv_bn_act`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import DepthwiseConfig
from ..gpu.depthwise import depthwise_rows, output_columns
from ..gpu.device import scale_shift
from ..gpu.launch import SIZES, Launch, answer, cdiv, channel_vector, geometry_constants, needs_int64, nhwc, tap_major
from ..gpu.select import depthwise_config
from ..layout import empty_like_conv, memory_format_of


@triton.jit(do_not_specialize=SIZES)
def _dwconv_bn_act_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [kh, kw, C]
    scale_ptr,  # [C] or None
    shift_ptr,  # [C] or None
    y_ptr,  # [N, OH, OW, C]
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
    """y = ACT(dwconv(x, w) * scale + shift): ROWS output rows of BLOCK_P columns of BLOCK_C channels."""
    channels = channel_groups * VEC
    # channels vary fastest: neighbouring programs share the memory pages of a pixel
    n_c = tl.cdiv(channels, BLOCK_C)
    i_n, i_strip, o_ow, m_p = output_columns(tl.program_id(0) // n_c, columns, n_strips, out_w, INT64, BLOCK_P)
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_oh = i_strip * ROWS
    acc = depthwise_rows(
        x_ptr, w_ptr, i_n, o_oh, o_ow, m_p, o_c, m_c, height, width, channels,
        PAD_T, PAD_L, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ROWS, BLOCK_P, BLOCK_C,
        None, None, None, "none",
    )  # fmt: skip
    # all loads before the first store: Triton can't know that y overlaps neither scale nor shift
    b_y = ()
    for row in tl.static_range(ROWS):
        b_y += (scale_shift(acc[row], scale_ptr, shift_ptr, o_c, m_c, ACT),)
    for row in tl.static_range(ROWS):
        oh = o_oh + row
        p_y = y_ptr + (((i_n * out_h + oh) * out_w + o_ow) * channels)[:, None] + o_c[None, :]
        tl.store(p_y, b_y[row].to(y_ptr.dtype.element_ty), mask=(m_p & (oh < out_h))[:, None] & m_c[None, :])


def build(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [C, 1, kh, kw]
    scale: torch.Tensor | None,  # [C]
    shift: torch.Tensor | None,  # [C]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    act: str,
    packed: torch.Tensor | None = None,
    config: DepthwiseConfig | None = None,
    int64: bool | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, `out` or new, in channels_last memory and not yet written, and the launches that write it."""
    x = nhwc(x)
    kernel_size = (weight.shape[2], weight.shape[3])
    y = out
    if y is None:
        y = empty_like_conv(x, weight.shape[0], kernel_size, stride, padding, dilation, torch.channels_last)
    batch, channels, out_h, out_w = y.shape
    if y.numel() == 0:
        return y, []
    config = config or depthwise_config(tuple(y.shape), kernel_size, (stride[0], stride[1]), x.dtype, x.device)
    vector = channel_vector(channels)
    n_strips = cdiv(out_h, config.rows)
    columns = batch * n_strips * out_w
    launch = Launch(
        kernel=_dwconv_bn_act_fwd_kernel,
        grid=(cdiv(columns, config.columns) * cdiv(channels, config.channels),),
        arguments=(
            x, tap_major(weight), scale, shift, y,
            columns, n_strips, x.shape[2], x.shape[3], channels // vector, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel_size, stride, padding, dilation),
            "ACT": act,
            "VEC": vector,
            "INT64": needs_int64(x, y) if int64 is None else int64,
            "ROWS": config.rows,
            "BLOCK_P": config.columns,
            "BLOCK_C": config.channels,
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def dwconv_bn_act(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others), memory_format_of(x))
