"""Triton kernel and launcher of `pwconv_bn_act`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import GemmConfig
from ..gpu.device import dot, grouped_tile, store_epilogue
from ..gpu.launch import SIZES, Launch, answer, cdiv, channel_vector, dot_precision, needs_int64, nhwc
from ..gpu.select import gemm_config
from ..layout import memory_format_of


@triton.jit(do_not_specialize=SIZES)
def _pwconv_bn_act_fwd_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    scale_ptr,  # [N] or None
    shift_ptr,  # [N] or None
    gamma_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    m,
    n_groups,
    k_groups,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_N: tl.constexpr,
    VEC_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = ACT(x w^T * scale + shift) * gamma + residual, accumulated in float32."""
    n = n_groups * VEC_N
    k = k_groups * VEC_K
    i_m, i_n = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < m
    m_n = o_n < n
    if INT64:
        o_m = o_m.to(tl.int64)
    p_x = x_ptr + o_m[:, None] * k + o_k[None, :]
    p_w = w_ptr + o_n[None, :] * k + o_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = o_k < k - k0
            b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0)
        acc = dot(b_x, b_w, acc, PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K
    store_epilogue(acc, scale_ptr, shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_m * n, m_m, i_n * BLOCK_N, n, ACT)


def matrix_launch(
    x: torch.Tensor,  # M rows of K, dense
    weight: torch.Tensor,  # N rows of K, dense
    scale: torch.Tensor | None,  # [N]
    shift: torch.Tensor | None,  # [N]
    act: str,
    gamma: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # M rows of N, dense
    y: torch.Tensor,  # M rows of N, dense
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> Launch:
    """The launch that writes y = act(x w^T * scale + shift) * gamma + residual."""
    n = weight.shape[0]
    k = weight.numel() // n
    m = y.numel() // n
    config = config or gemm_config("pwconv_bn_act", m, n, k, x.dtype, x.device)
    vector_n, vector_k = channel_vector(n), channel_vector(k)
    return Launch(
        kernel=_pwconv_bn_act_fwd_kernel,
        grid=(cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        arguments=(x, weight, scale, shift, gamma, residual, y, m, n // vector_n, k // vector_k),
        constants={
            "ACT": act,
            "PRECISION": dot_precision(x),
            "VEC_N": vector_n,
            "VEC_K": vector_k,
            "EVEN_K": k % config.block_k == 0,
            "INT64": needs_int64(x, y) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config=config,
    )


def build(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [K, C, 1, 1]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    act: str,
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, H, W]
    packed: torch.Tensor | None = None,
    config: GemmConfig | None = None,
    int64: bool | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, `out` or new, in channels_last memory and not yet written, and the launches that write it."""
    x = nhwc(x)
    size = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    y = out
    if y is None:
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, []
    residual = None if residual is None else nhwc(residual)
    # [K, C] rows whatever the weight's memory format
    weight = weight.flatten(1).contiguous()
    return y, [matrix_launch(x, weight, scale, shift, act, gamma, residual, y, config, int64)]


def pwconv_bn_act(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others), memory_format_of(x))
