"""Triton kernel and launcher of `kv_downsample`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import GemmConfig
from ..gpu.device import dot, scale_shift
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
    tap_major,
)
from ..gpu.select import kv_config
from .contract import fake


@triton.jit(do_not_specialize=SIZES)
def _kv_downsample_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    key_down_ptr,  # [kh, kw, C], or None: no depthwise
    key_scale_ptr,  # [C] or None
    key_shift_ptr,  # [C] or None
    key_project_ptr,  # [Dk, C]
    value_down_ptr,
    value_scale_ptr,
    value_shift_ptr,
    value_project_ptr,  # [Dv, C]
    key_ptr,  # [N, P, Dk]
    value_ptr,  # [N, P, Dv]
    m,
    height,
    width,
    channel_groups,
    key_depth,
    value_depth,
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
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """key = (dw(x, key_down) * key_scale + key_shift) key_project^T, value likewise; each x element feeds both."""
    channels = channel_groups * VEC
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    if INT64:
        o_m = o_m.to(tl.int64)
    o_line = o_m // out_w
    o_ih = (o_line % out_h) * STRIDE_H - PAD_T
    o_iw = (o_m % out_w) * STRIDE_W - PAD_L
    p_image = x_ptr + (o_line // out_h) * height * width * channels
    o_n = tl.arange(0, BLOCK_N)
    m_key = o_n < key_depth
    m_value = o_n < value_depth
    key = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c0 in range(0, channels, BLOCK_K):
        o_c = c0 + tl.arange(0, BLOCK_K)
        m_c = o_c < channels
        o_w = o_n[None, :] * channels + o_c[:, None]
        b_wk = tl.load(key_project_ptr + o_w, mask=m_key[None, :] & m_c[:, None], other=0.0)
        b_wv = tl.load(value_project_ptr + o_w, mask=m_value[None, :] & m_c[:, None], other=0.0)
        b_k = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        b_v = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for tap in range(KERNEL_H * KERNEL_W):
            ih = o_ih + (tap // KERNEL_W) * DILATION_H
            iw = o_iw + (tap % KERNEL_W) * DILATION_W
            m_x = m_m & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            p_x = (p_image + (ih * width + iw) * channels)[:, None] + o_c[None, :]
            b_x = tl.load(p_x, mask=m_x[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            if key_down_ptr is not None:
                b_k += b_x * tl.load(key_down_ptr + tap * channels + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
                b_v += b_x * tl.load(value_down_ptr + tap * channels + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            else:
                b_k += b_x
                b_v += b_x
        b_k = scale_shift(b_k, key_scale_ptr, key_shift_ptr, o_c, m_c, "none").to(x_ptr.dtype.element_ty)
        b_v = scale_shift(b_v, value_scale_ptr, value_shift_ptr, o_c, m_c, "none").to(x_ptr.dtype.element_ty)
        key = dot(b_k, b_wk, key, PRECISION)
        value = dot(b_v, b_wv, value, PRECISION)
    p_key = key_ptr + o_m[:, None] * key_depth + o_n[None, :]
    p_value = value_ptr + o_m[:, None] * value_depth + o_n[None, :]
    tl.store(p_key, key.to(key_ptr.dtype.element_ty), mask=m_m[:, None] & m_key[None, :])
    tl.store(p_value, value.to(value_ptr.dtype.element_ty), mask=m_m[:, None] & m_value[None, :])


def build(
    x: torch.Tensor,  # [N, C, H, W]
    key_down: torch.Tensor | None,  # [C, 1, kh, kw]
    key_scale: torch.Tensor | None,  # [C]
    key_shift: torch.Tensor | None,  # [C]
    key_project: torch.Tensor,  # [Dk, C, 1, 1]
    value_down: torch.Tensor | None,  # [C, 1, kh, kw]
    value_scale: torch.Tensor | None,  # [C]
    value_shift: torch.Tensor | None,  # [C]
    value_project: torch.Tensor,  # [Dv, C, 1, 1]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    packed: torch.Tensor | None = None,
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """(key, value), not yet written, and the launches that write them."""
    key, value = fake(
        x, key_down, key_scale, key_shift, key_project, value_down, value_scale, value_shift, value_project,
        stride, padding, dilation,
    )  # fmt: skip
    if key.numel() + value.numel() == 0:
        return (key, value), []
    x = nhwc(x)
    batch, positions, key_depth = key.shape
    channels, value_depth = x.shape[1], value.shape[2]
    if key_down is None:
        kernel_size, stride, padding, dilation = (1, 1), [1, 1], [0] * 4, [1, 1]
        out_h, out_w = x.shape[2], x.shape[3]
    else:
        kernel_size = (key_down.shape[2], key_down.shape[3])
        out_w = (x.shape[3] + padding[2] + padding[3] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
        out_h = positions // out_w
    m = batch * positions
    config = config or kv_config(m, max(key_depth, value_depth), channels, x.dtype, x.device)
    vector = channel_vector(channels)
    launch = Launch(
        kernel=_kv_downsample_fwd_kernel,
        grid=(cdiv(m, config.block_m),),
        arguments=(
            x,
            None if key_down is None else tap_major(key_down), key_scale, key_shift,
            key_project.flatten(1).contiguous(),
            None if value_down is None else tap_major(value_down), value_scale, value_shift,
            value_project.flatten(1).contiguous(),
            key, value,
            m, x.shape[2], x.shape[3], channels // vector, key_depth, value_depth, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel_size, stride, padding, dilation),
            "PRECISION": dot_precision(x),
            "VEC": vector,
            "INT64": needs_int64(x, key, value) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            # both products cover the whole depth, whatever a config says
            "BLOCK_N": max(16, next_power_of_2(max(key_depth, value_depth))),
            "BLOCK_K": config.block_k,
        },
        config=config,
    )  # fmt: skip
    return (key, value), [launch]


def kv_downsample(x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA implementation of the op; NCHW input is converted."""
    return answer(build(x, *others))
