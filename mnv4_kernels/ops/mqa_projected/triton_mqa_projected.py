"""Triton kernel and launcher of `mqa_projected`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu import gate
from ..gpu.config import AttentionConfig
from ..gpu.device import dot, scale_shift, store_epilogue
from ..gpu.gate import MAX_PROJECTED_OUTPUTS, AttentionShape, Decision
from ..gpu.launch import Launch, answer, cdiv, channel_vector, dot_precision, needs_int64, next_power_of_2, nhwc
from ..gpu.select import ceilings, projected_attention_config
from ..layout import memory_format_of
from ..mqa import triton_mqa as attention
from ..pwconv_bn_act import triton_pwconv_bn_act as pointwise


@triton.jit
def _mqa_projected_fwd_kernel(
    x_ptr,  # [N, L, C]
    query_ptr,  # [heads * Dk, C]
    query_scale_ptr,  # [heads * Dk] or None
    query_shift_ptr,  # [heads * Dk] or None
    key_ptr,  # [N, P, Dk]
    value_ptr,  # [N, P, Dv]
    output_ptr,  # [K, heads * Dv]
    gamma_ptr,  # [K] or None
    residual_ptr,  # [N, L, K] or None
    y_ptr,  # [N, L, K]
    positions,
    keys,
    heads,
    channel_groups,
    outputs,
    key_depth,
    value_depth,
    log2_scale,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (heads of softmax(q key^T * scale) value) output^T * gamma + residual, q = x query^T, head by head.

    Neither queries nor attended values reach memory; key and value of the image stay on chip for all heads.
    """
    channels = channel_groups * VEC
    n_m = tl.cdiv(positions, BLOCK_M)
    i_image = tl.program_id(0) // n_m
    i_block = tl.program_id(0) % n_m
    if INT64:
        i_image = i_image.to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_p = tl.arange(0, BLOCK_P)
    o_c = tl.arange(0, BLOCK_C)
    o_dk = tl.arange(0, BLOCK_DK)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = tl.arange(0, BLOCK_N)
    m_m = o_m < positions
    m_p = o_p < keys
    m_dk = o_dk < key_depth
    m_dv = o_dv < value_depth
    m_n = o_n < outputs
    p_key = key_ptr + i_image * keys * key_depth + o_p[None, :] * key_depth + o_dk[:, None]
    p_value = value_ptr + i_image * keys * value_depth + o_p[:, None] * value_depth + o_dv[None, :]
    b_k = tl.load(p_key, mask=m_p[None, :] & m_dk[:, None], other=0.0)
    b_v = tl.load(p_value, mask=m_p[:, None] & m_dv[None, :], other=0.0)
    p_x = x_ptr + (i_image * positions + o_m)[:, None] * channels + o_c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_head in range(heads):
        q0 = i_head * key_depth
        b_q = tl.zeros([BLOCK_M, BLOCK_DK], tl.float32)
        for c0 in range(0, channels, BLOCK_C):
            m_c = o_c < channels - c0
            b_x = tl.load(p_x + c0, mask=m_m[:, None] & m_c[None, :], other=0.0)
            p_w = query_ptr + (q0 + o_dk)[None, :] * channels + (c0 + o_c)[:, None]
            b_w = tl.load(p_w, mask=m_dk[None, :] & m_c[:, None], other=0.0)
            b_q = dot(b_x, b_w, b_q, PRECISION)
        b_q = scale_shift(b_q, query_scale_ptr, query_shift_ptr, q0 + o_dk, m_dk, "none").to(dtype)
        scores = dot(b_q, b_k, tl.zeros([BLOCK_M, BLOCK_P], tl.float32), PRECISION) * log2_scale
        scores = tl.where(m_p[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        b_o = dot(weights.to(dtype), b_v, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), PRECISION)
        b_o = (b_o / total[:, None]).to(dtype)
        p_w = output_ptr + o_n[None, :] * (heads * value_depth) + (i_head * value_depth + o_dv)[:, None]
        b_w = tl.load(p_w, mask=m_n[None, :] & m_dv[:, None], other=0.0)
        acc = dot(b_o, b_w, acc, PRECISION)
    o_row = (i_image * positions + o_m) * outputs
    store_epilogue(acc, None, None, gamma_ptr, residual_ptr, y_ptr, o_row, m_m, 0, outputs, "none")


def decide(
    x: torch.Tensor,
    query_weight: torch.Tensor,
    query_scale: torch.Tensor | None,
    query_shift: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    heads: int,
    scale: float,
) -> Decision:
    """What the gate picks for this call."""
    batch, channels, height, width = x.shape
    shape = AttentionShape(
        batch, channels, output_weight.shape[0], height * width, key.shape[1], heads, key.shape[2], value.shape[2],
        residual is not None,
    )  # fmt: skip
    return gate.attention(shape, x.element_size(), ceilings(x.device))


def build(
    x: torch.Tensor,  # [N, C, H, W]
    query_weight: torch.Tensor,  # [heads * Dk, C, 1, 1]
    query_scale: torch.Tensor | None,  # [heads * Dk]
    query_shift: torch.Tensor | None,  # [heads * Dk]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    output_weight: torch.Tensor,  # [K, heads * Dv, 1, 1]
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, H, W]
    heads: int,
    scale: float,
    config: AttentionConfig | None = None,
    int64: bool | None = None,
    *,
    fuse: bool = True,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it.

    One launch; three where `fuse` is False or a program can't hold the keys or the outputs.
    """
    x = nhwc(x)
    batch, channels, height, width = x.shape
    outputs, keys, positions = output_weight.shape[0], key.shape[1], height * width
    key_depth, value_depth = key.shape[2], value.shape[2]
    config = config or projected_attention_config(positions, keys, key_depth, batch, x.dtype, x.device)
    if not fuse or outputs > MAX_PROJECTED_OUTPUTS or keys > config.keys:
        query, first = pointwise.build(x, query_weight, query_scale, query_shift, "none", None, None, int64=int64)
        mixed, second = attention.build(query, key, value, heads, scale, int64=int64)
        y, third = pointwise.build(mixed, output_weight, None, None, "none", gamma, residual, int64=int64)
        return y, first + second + third
    size = (batch, outputs, height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, []
    vector = channel_vector(channels)
    launch = Launch(
        kernel=_mqa_projected_fwd_kernel,
        grid=(cdiv(positions, config.queries) * batch,),
        arguments=(
            x, query_weight.flatten(1).contiguous(), query_scale, query_shift, key.contiguous(), value.contiguous(),
            output_weight.flatten(1).contiguous(), gamma, None if residual is None else nhwc(residual), y,
            positions, keys, heads, channels // vector, outputs, key_depth, value_depth, scale * 1.4426950408889634,
        ),
        constants={
            "PRECISION": dot_precision(x),
            "VEC": vector,
            "INT64": needs_int64(x, key, value, y) if int64 is None else int64,
            "BLOCK_M": config.queries,
            "BLOCK_P": config.keys,
            "BLOCK_C": max(16, min(128 // x.element_size(), next_power_of_2(channels))),
            "BLOCK_DK": max(16, next_power_of_2(key_depth)),
            "BLOCK_DV": max(16, next_power_of_2(value_depth)),
            "BLOCK_N": max(16, next_power_of_2(outputs)),
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def mqa_projected(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others, fuse=decide(x, *others).plan.fuse_mid), memory_format_of(x))
