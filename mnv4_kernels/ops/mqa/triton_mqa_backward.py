"""Triton kernels and launcher of `mqa_backward`: attention weights are computed anew, nothing of the forward is kept.

One pass over queries: each row's log-sum-exp and the sum that softmax's derivative subtracts, then dquery.
One over keys, a part of the queries each, with both at hand: dkey and dvalue, whose parts are joined in order.
"""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.config import AttentionConfig
from ..gpu.device import dot
from ..gpu.launch import Gradients, Launch, answer, cdiv, dot_precision, needs_int64, next_power_of_2, nhwc
from ..gpu.reduction import join_sums
from ..gpu.select import attention_backward_config
from ..layout import memory_format_of
from .reference import backward_reference


@triton.jit
def _mqa_bwd_dquery_kernel(
    grad_ptr,  # [N, Q, Dv], Q = positions * heads
    query_ptr,  # [N, Q, Dk]
    key_ptr,  # [N, P, Dk]
    value_ptr,  # [N, P, Dv]
    dquery_ptr,  # [N, Q, Dk]
    level_ptr,  # [N, Q] log2 of the sum of exponentials
    shared_ptr,  # [N, Q] sum over keys of weight * dweight
    queries,
    keys,
    key_depth,
    value_depth,
    scale,
    log2_scale,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dquery = (weight * (dweight - sum(weight * dweight))) key * scale, dweight = grad value^T."""
    # images on the long axis; a division of it would spill on sm_80
    i_image = tl.program_id(0)
    if INT64:
        i_image = i_image.to(tl.int64)
    o_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_p = tl.arange(0, BLOCK_P)
    o_dk = tl.arange(0, BLOCK_DK)
    o_dv = tl.arange(0, BLOCK_DV)
    m_q = o_q < queries
    m_dk = o_dk < key_depth
    m_dv = o_dv < value_depth
    o_query = (i_image * queries + o_q)[:, None] * key_depth + o_dk[None, :]
    o_grad = (i_image * queries + o_q)[:, None] * value_depth + o_dv[None, :]
    p_key = key_ptr + i_image * keys * key_depth + o_p[:, None] * key_depth + o_dk[None, :]
    p_value = value_ptr + i_image * keys * value_depth + o_p[:, None] * value_depth + o_dv[None, :]
    b_q = tl.load(query_ptr + o_query, mask=m_q[:, None] & m_dk[None, :], other=0.0)
    b_dy = tl.load(grad_ptr + o_grad, mask=m_q[:, None] & m_dv[None, :], other=0.0)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    shared = tl.zeros([BLOCK_Q], tl.float32)
    for p0 in range(0, keys, BLOCK_P):
        m_p = o_p < keys - p0
        b_k = tl.load(p_key + p0 * key_depth, mask=m_p[:, None] & m_dk[None, :], other=0.0)
        b_v = tl.load(p_value + p0 * value_depth, mask=m_p[:, None] & m_dv[None, :], other=0.0)
        scores = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION) * log2_scale
        scores = tl.where(m_p[None, :], scores, float("-inf"))
        dweights = dot(b_dy, tl.trans(b_v), tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION)
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        rescale = tl.exp2(highest - raised)
        total = total * rescale + tl.sum(weights, 1)
        shared = shared * rescale + tl.sum(weights * dweights, 1)
        highest = raised
    level = highest + tl.log2(total)
    shared = shared / total
    tl.store(level_ptr + i_image * queries + o_q, level, mask=m_q)
    tl.store(shared_ptr + i_image * queries + o_q, shared, mask=m_q)
    acc = tl.zeros([BLOCK_Q, BLOCK_DK], tl.float32)
    for p0 in range(0, keys, BLOCK_P):
        m_p = o_p < keys - p0
        b_k = tl.load(p_key + p0 * key_depth, mask=m_p[:, None] & m_dk[None, :], other=0.0)
        b_v = tl.load(p_value + p0 * value_depth, mask=m_p[:, None] & m_dv[None, :], other=0.0)
        scores = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION) * log2_scale
        weights = tl.where(m_p[None, :], tl.exp2(scores - level[:, None]), 0.0)
        dweights = dot(b_dy, tl.trans(b_v), tl.zeros([BLOCK_Q, BLOCK_P], tl.float32), PRECISION)
        dscores = weights * (dweights - shared[:, None])
        acc = dot(dscores.to(b_k.dtype), b_k, acc, PRECISION)
    tl.store(dquery_ptr + o_query, (acc * scale).to(dquery_ptr.dtype.element_ty), mask=m_q[:, None] & m_dk[None, :])


@triton.jit
def _mqa_bwd_dkey_kernel(
    grad_ptr,  # [N, Q, Dv], Q = positions * heads
    query_ptr,  # [N, Q, Dk]
    key_ptr,  # [N, P, Dk]
    value_ptr,  # [N, P, Dv]
    level_ptr,  # [N, Q]
    shared_ptr,  # [N, Q]
    key_partial_ptr,  # [parts, N, P, Dk]
    value_partial_ptr,  # [parts, N, P, Dv]
    batch,
    queries,
    keys,
    key_depth,
    value_depth,
    tiles,
    scale,
    log2_scale,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dvalue = weight^T grad and dkey = dscore^T query of a block of keys, over `tiles` tiles of queries."""
    n_p = tl.cdiv(keys, BLOCK_P)
    n_parts = tl.cdiv(queries, BLOCK_Q * tiles)
    i_image = tl.program_id(0) // (n_parts * n_p)
    i_part = tl.program_id(0) // n_p % n_parts
    if INT64:
        i_image = i_image.to(tl.int64)
    o_p = (tl.program_id(0) % n_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_dk = tl.arange(0, BLOCK_DK)
    o_dv = tl.arange(0, BLOCK_DV)
    m_key = (o_p < keys)[:, None] & (o_dk < key_depth)[None, :]
    m_value = (o_p < keys)[:, None] & (o_dv < value_depth)[None, :]
    o_key = (i_image * keys + o_p)[:, None] * key_depth + o_dk[None, :]
    o_value = (i_image * keys + o_p)[:, None] * value_depth + o_dv[None, :]
    b_k = tl.load(key_ptr + o_key, mask=m_key, other=0.0)
    b_v = tl.load(value_ptr + o_value, mask=m_value, other=0.0)
    acc_k = tl.zeros([BLOCK_P, BLOCK_DK], tl.float32)
    acc_v = tl.zeros([BLOCK_P, BLOCK_DV], tl.float32)
    for i_tile in range(i_part * tiles, (i_part + 1) * tiles):
        o_q = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < queries
        o_row = i_image * queries + o_q
        m_dk = m_q[:, None] & (o_dk < key_depth)[None, :]
        m_dv = m_q[:, None] & (o_dv < value_depth)[None, :]
        b_q = tl.load(query_ptr + o_row[:, None] * key_depth + o_dk[None, :], mask=m_dk, other=0.0)
        b_dy = tl.load(grad_ptr + o_row[:, None] * value_depth + o_dv[None, :], mask=m_dv, other=0.0)
        # queries that there are not have no weight
        level = tl.load(level_ptr + o_row, mask=m_q, other=float("inf"))
        shared = tl.load(shared_ptr + o_row, mask=m_q, other=0.0)
        scores = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_P, BLOCK_Q], tl.float32), PRECISION) * log2_scale
        weights = tl.exp2(scores - level[None, :])
        acc_v = dot(weights.to(b_dy.dtype), b_dy, acc_v, PRECISION)
        dweights = dot(b_v, tl.trans(b_dy), tl.zeros([BLOCK_P, BLOCK_Q], tl.float32), PRECISION)
        dscores = weights * (dweights - shared[None, :])
        acc_k = dot(dscores.to(b_q.dtype), b_q, acc_k, PRECISION)
    p_key = key_partial_ptr + i_part.to(tl.int64) * batch * keys * key_depth
    p_value = value_partial_ptr + i_part.to(tl.int64) * batch * keys * value_depth
    tl.store(p_key + o_key, acc_k * scale, mask=m_key)
    tl.store(p_value + o_value, acc_v, mask=m_value)


def build(
    grad: torch.Tensor,  # [N, heads * Dv, H, W]
    query: torch.Tensor,  # [N, heads * Dk, H, W]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    heads: int,
    scale: float,
    config: AttentionConfig | None = None,
    int64: bool | None = None,
) -> tuple[Gradients, list[Launch]]:
    """(dquery in channels_last memory, dkey, dvalue), not yet written, and the launches that write them."""
    grad, query = nhwc(grad), nhwc(query)
    key, value = key.contiguous(), value.contiguous()
    batch, keys, key_depth = key.shape
    value_depth = value.shape[2]
    queries = query.shape[2] * query.shape[3] * heads
    config = config or attention_backward_config(
        queries, keys, max(key_depth, value_depth), batch, query.dtype, query.device
    )
    dquery = torch.empty_like(query)
    dkey, dvalue = key.new_empty(key.shape), value.new_empty(value.shape)
    level, shared = (query.new_empty((batch, queries), dtype=torch.float32) for _ in range(2))
    parts = cdiv(queries, config.queries * config.tiles)
    partial = [value.new_empty((parts, *tensor.shape), dtype=torch.float32) for tensor in (key, value)]
    constants = {
        "PRECISION": dot_precision(query),
        "INT64": needs_int64(query, grad, key, value) if int64 is None else int64,
        "BLOCK_Q": config.queries,
        "BLOCK_P": config.keys,
        "BLOCK_DK": max(16, next_power_of_2(key_depth)),
        "BLOCK_DV": max(16, next_power_of_2(value_depth)),
    }
    tensors = (grad, query, key, value)
    sizes = (queries, keys, key_depth, value_depth)
    scales = (scale, scale * 1.4426950408889634)
    first = Launch(
        kernel=_mqa_bwd_dquery_kernel,
        grid=(batch, cdiv(queries, config.queries)),
        arguments=(*tensors, dquery, level, shared, *sizes, *scales),
        constants=constants,
        config=config,
    )
    second = Launch(
        kernel=_mqa_bwd_dkey_kernel,
        grid=(parts * cdiv(keys, config.keys) * batch,),
        arguments=(*tensors, level, shared, *partial, batch, *sizes, config.tiles, *scales),
        constants=constants,
        config=config,
    )
    joins = [launch for part, out in zip(partial, (dkey, dvalue), strict=True) for launch in join_sums(part, out)[1]]
    return (dquery, dkey, dvalue), [first, second, *joins]


def mqa_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> Gradients:
    """CUDA implementation of the op; NCHW maps are converted, and dquery goes back to the queries' format."""
    if grad.numel() == 0 or key.numel() == 0:
        return backward_reference(grad, query, key, value, heads, scale)
    return answer(build(grad, query, key, value, heads, scale), memory_format_of(query))
