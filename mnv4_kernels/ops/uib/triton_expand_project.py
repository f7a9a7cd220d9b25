"""Triton kernel of a block without dw_mid: both of its products in one launch, the expanded rows on chip."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.config import GemmConfig
from ..gpu.device import dot, scale_shift, store_epilogue
from ..gpu.launch import SIZES, Launch, cdiv, channel_vector, dot_precision, needs_int64, next_power_of_2, nhwc
from ..gpu.select import expand_project_config


@triton.jit(do_not_specialize=SIZES)
def _expand_project_fwd_kernel(
    x_ptr,  # [M, C]
    expand_ptr,  # [E, C]
    expand_scale_ptr,  # [E] or None
    expand_shift_ptr,  # [E] or None
    project_ptr,  # [K, E]
    project_scale_ptr,  # [K] or None
    project_shift_ptr,  # [K] or None
    gamma_ptr,  # [K] or None
    residual_ptr,  # [M, K] or None
    y_ptr,  # [M, K]
    m,
    channel_groups,
    hidden_groups,
    output_groups,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_E: tl.constexpr,
    VEC_K: tl.constexpr,
    EVEN_C: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (h project^T * scale + shift) * gamma + residual, h = ACT(x expand^T * expand_scale + expand_shift).

    A program makes BLOCK_H columns of its rows of h at a time and adds their share of y, all of whose columns it holds.
    """
    channels = channel_groups * VEC_C
    hidden = hidden_groups * VEC_E
    outputs = output_groups * VEC_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, BLOCK_C)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m < m
    m_n = o_n < outputs
    if INT64:
        o_m = o_m.to(tl.int64)
    p_rows = x_ptr + o_m[:, None] * channels + o_c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h0 in range(0, hidden, BLOCK_H):
        o_h = h0 + tl.arange(0, BLOCK_H)
        m_h = o_h < hidden
        p_x = p_rows
        p_w = expand_ptr + o_h[None, :] * channels + o_c[:, None]
        b_h = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            if EVEN_C:
                b_x = tl.load(p_x, mask=m_m[:, None], other=0.0)
                b_w = tl.load(p_w, mask=m_h[None, :], other=0.0)
            else:
                m_c = o_c < channels - c0
                b_x = tl.load(p_x, mask=m_m[:, None] & m_c[None, :], other=0.0)
                b_w = tl.load(p_w, mask=m_h[None, :] & m_c[:, None], other=0.0)
            b_h = dot(b_x, b_w, b_h, PRECISION)
            p_x += BLOCK_C
            p_w += BLOCK_C
        b_h = scale_shift(b_h, expand_scale_ptr, expand_shift_ptr, o_h, m_h, ACT).to(x_ptr.dtype.element_ty)
        p_w = project_ptr + o_n[None, :] * hidden + o_h[:, None]
        # beyond the last hidden channel the weight is zero, so whatever ACT makes of the padding is harmless
        b_w = tl.load(p_w, mask=m_n[None, :] & m_h[:, None], other=0.0)
        acc = dot(b_h, b_w, acc, PRECISION)
    o_row = o_m * outputs
    store_epilogue(
        acc, project_scale_ptr, project_shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_row, m_m, 0, outputs, "none"
    )


def build(
    x: torch.Tensor,  # [N, C, H, W]
    expand_weight: torch.Tensor,  # [E, C, 1, 1]
    expand_scale: torch.Tensor | None,  # [E]
    expand_shift: torch.Tensor | None,  # [E]
    act: str,
    project_weight: torch.Tensor,  # [K, E, 1, 1]
    project_scale: torch.Tensor | None,  # [K]
    project_shift: torch.Tensor | None,  # [K]
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, H, W]
    out: torch.Tensor,  # [N, K, H, W]
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> list[Launch]:
    """The launch that writes `out`, channels_last and not empty."""
    x = nhwc(x)
    hidden, channels = expand_weight.shape[0], expand_weight.shape[1]
    outputs = project_weight.shape[0]
    m = out.numel() // outputs
    config = config or expand_project_config(m, channels, hidden, outputs, x.dtype, x.device)
    vectors = [channel_vector(count) for count in (channels, hidden, outputs)]
    launch = Launch(
        kernel=_expand_project_fwd_kernel,
        grid=(cdiv(m, config.block_m),),
        arguments=(
            x, expand_weight.flatten(1).contiguous(), expand_scale, expand_shift,
            project_weight.flatten(1).contiguous(), project_scale, project_shift, gamma,
            None if residual is None else nhwc(residual), out, m,
            channels // vectors[0], hidden // vectors[1], outputs // vectors[2],
        ),
        constants={
            "ACT": act,
            "PRECISION": dot_precision(x),
            "VEC_C": vectors[0],
            "VEC_E": vectors[1],
            "VEC_K": vectors[2],
            "EVEN_C": channels % config.block_k == 0,
            "INT64": needs_int64(x, out) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            "BLOCK_H": config.block_n,
            "BLOCK_C": config.block_k,
            "BLOCK_N": max(16, next_power_of_2(outputs)),
        },
        config=config,
    )  # fmt: skip
    return [launch]
