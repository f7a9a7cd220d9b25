"""Triton kernel and launcher of `mqa`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import AttentionConfig
from ..gpu.device import dot
from ..gpu.launch import Launch, answer, cdiv, dot_precision, needs_int64, next_power_of_2, nhwc
from ..gpu.select import attention_config
from ..layout import memory_format_of


@triton.jit
def _mqa_fwd_kernel(
    query_ptr,  # [N, Q, Dk], Q = positions * heads
    key_ptr,  # [N, P, Dk]
    value_ptr,  # [N, P, Dv]
    y_ptr,  # [N, Q, Dv]
    queries,
    keys,
    key_depth,
    value_depth,
    log2_scale,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """y = softmax(query key^T * scale) value; TILES tiles of BLOCK_Q queries of one image.

    All heads share key and value, so heads are further rows of queries. RESIDENT: all keys fit BLOCK_P, are
    loaded once and kept for all tiles; otherwise they pass in blocks, with a running maximum and sum.
    """
    n_q = tl.cdiv(queries, BLOCK_Q * TILES)
    i_image = tl.program_id(0) // n_q
    i_block = tl.program_id(0) % n_q
    if INT64:
        i_image = i_image.to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_dk = tl.arange(0, BLOCK_DK)
    o_dv = tl.arange(0, BLOCK_DV)
    m_dk = o_dk < key_depth
    m_dv = o_dv < value_depth
    p_query = query_ptr + i_image * queries * key_depth + o_dk[None, :]
    p_key = key_ptr + i_image * keys * key_depth + o_p[None, :] * key_depth + o_dk[:, None]
    p_value = value_ptr + i_image * keys * value_depth + o_p[:, None] * value_depth + o_dv[None, :]
    p_y = y_ptr + i_image * queries * value_depth + o_dv[None, :]
    if RESIDENT:
        b_k = tl.load(p_key, mask=(o_p < keys)[None, :] & m_dk[:, None], other=0.0)
        b_v = tl.load(p_value, mask=(o_p < keys)[:, None] & m_dv[None, :], other=0.0)
    for i_tile in range(TILES):
        o_q = (i_block * TILES + i_tile) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < queries
        b_q = tl.load(p_query + o_q[:, None] * key_depth, mask=m_q[:, None] & m_dk[None, :], other=0.0)
        if RESIDENT:
            scores = dot(b_q, b_k, tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION) * log2_scale
            scores = tl.where((o_p < keys)[None, :], scores, float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weights, 1)
            acc = dot(weights.to(b_v.dtype), b_v, tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32), PRECISION)
        else:
            highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
            for p0 in range(0, keys, BLOCK_P):
                m_p = o_p < keys - p0
                b_k = tl.load(p_key + p0 * key_depth, mask=m_p[None, :] & m_dk[:, None], other=0.0)
                b_v = tl.load(p_value + p0 * value_depth, mask=m_p[:, None] & m_dv[None, :], other=0.0)
                scores = dot(b_q, b_k, tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION) * log2_scale
                scores = tl.where(m_p[None, :], scores, float("-inf"))
                raised = tl.maximum(highest, tl.max(scores, 1))
                weights = tl.exp2(scores - raised[:, None])
                rescale = tl.exp2(highest - raised)
                total = total * rescale + tl.sum(weights, 1)
                acc = dot(weights.to(b_v.dtype), b_v, acc * rescale[:, None], PRECISION)
                highest = raised
        b_y = acc / total[:, None]
        tl.store(p_y + o_q[:, None] * value_depth, b_y.to(y_ptr.dtype.element_ty), mask=m_q[:, None] & m_dv[None, :])


def build(
    query: torch.Tensor,  # [N, heads * Dk, H, W]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    heads: int,
    scale: float,
    config: AttentionConfig | None = None,
    int64: bool | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it."""
    query = nhwc(query)
    batch, _, height, width = query.shape
    keys, key_depth, value_depth = key.shape[1], key.shape[2], value.shape[2]
    size = (batch, heads * value_depth, height, width)
    y = torch.empty(size, dtype=query.dtype, device=query.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, []
    queries = height * width * heads
    config = config or attention_config(queries, keys, key_depth, batch, query.dtype, query.device)
    launch = Launch(
        kernel=_mqa_fwd_kernel,
        grid=(cdiv(queries, config.queries * config.tiles) * batch,),
        arguments=(
            query, key.contiguous(), value.contiguous(), y,
            queries, keys, key_depth, value_depth, scale * 1.4426950408889634,
        ),
        constants={
            "PRECISION": dot_precision(query),
            "INT64": needs_int64(query, key, value, y) if int64 is None else int64,
            "RESIDENT": keys <= config.keys,
            "TILES": config.tiles,
            "BLOCK_Q": config.queries,
            "BLOCK_P": config.keys,
            "BLOCK_DK": max(16, next_power_of_2(key_depth)),
            "BLOCK_DV": max(16, next_power_of_2(value_depth)),
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def mqa(query: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW queries are converted, and the result goes back to their format."""
    return answer(build(query, *others), memory_format_of(query))
