"""Triton kernel and launcher of `head`: the pool is a kernel, both products are `pwconv_bn_act`'s."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import PoolConfig
from ..gpu.launch import SIZES, Launch, answer, cdiv, channel_vector, needs_int64, nhwc
from ..gpu.select import pool_config
from ..pwconv_bn_act.triton_pwconv_bn_act import matrix_launch


@triton.jit(do_not_specialize=SIZES)
def _global_pool_fwd_kernel(
    x_ptr,  # [N, P, C]
    y_ptr,  # [N, C]
    positions,
    channel_groups,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = mean of x over its positions, summed in float32."""
    channels = channel_groups * VEC
    i_image = tl.program_id(0)
    if INT64:
        i_image = i_image.to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_x = x_ptr + i_image * positions * channels + o_p[:, None] * channels + o_c[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in range(0, positions, BLOCK_P):
        m_x = (o_p < positions - p0)[:, None] & m_c[None, :]
        acc += tl.load(p_x + p0 * channels, mask=m_x, other=0.0).to(tl.float32)
    b_y = tl.sum(acc, 0) / positions
    tl.store(y_ptr + i_image * channels + o_c, b_y.to(y_ptr.dtype.element_ty), mask=m_c)


def build(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [F, C, 1, 1]
    scale: torch.Tensor | None,  # [F]
    shift: torch.Tensor | None,  # [F]
    act: str,
    classifier_weight: torch.Tensor | None,  # [K, F]
    classifier_bias: torch.Tensor | None,  # [K]
    packed: torch.Tensor | None = None,
    classifier_packed: torch.Tensor | None = None,
    config: PoolConfig | None = None,
    int64: bool | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The logits or features, not yet written, and the launches that write them.

    Pooled values and features are rounded to x's dtype, as operands of matrix products.
    """
    x = nhwc(x)
    batch, channels, height, width = x.shape
    features = x.new_empty((batch, weight.shape[0]))
    if batch == 0:
        return features if classifier_weight is None else x.new_empty((0, classifier_weight.shape[0])), []
    pooled = x.new_empty((batch, channels))
    config = config or pool_config(tuple(x.shape), x.dtype, x.device)
    vector = channel_vector(channels)
    pool = Launch(
        kernel=_global_pool_fwd_kernel,
        grid=(batch, cdiv(channels, config.channels)),
        arguments=(x, pooled, height * width, channels // vector),
        constants={
            "VEC": vector,
            "INT64": needs_int64(x) if int64 is None else int64,
            "BLOCK_P": config.positions,
            "BLOCK_C": config.channels,
        },
        config=config,
    )
    expand = matrix_launch(pooled, weight.flatten(1).contiguous(), scale, shift, act, None, None, features)
    if classifier_weight is None:
        return features, [pool, expand]
    logits = x.new_empty((batch, classifier_weight.shape[0]))
    weight = classifier_weight.contiguous()
    classify = matrix_launch(features, weight, None, classifier_bias, "none", None, None, logits)
    return logits, [pool, expand, classify]


def head(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted."""
    return answer(build(x, *others))
