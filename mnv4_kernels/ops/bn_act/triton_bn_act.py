"""Triton kernel and launcher of `bn_act`."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import PositionsConfig
from ..gpu.launch import SIZES, Launch, answer, cdiv, channel_vector, needs_int64, nhwc
from ..gpu.normalise import normalisation, normalised
from ..gpu.select import positions_config
from ..layout import memory_format_of


@triton.jit
def image_positions(i_tile, positions, INT64: tl.constexpr, BLOCK_P: tl.constexpr):
    """(position [P] of all images' pixels, mask [P])."""
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < positions
    if INT64:
        o_p = o_p.to(tl.int64)
    return o_p, m_p


@triton.jit(do_not_specialize=SIZES)
def _bn_act_fwd_kernel(
    x_ptr,  # [P, C]
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    scale_ptr,  # [C] or None
    keep_ptr,  # [N] or None
    residual_ptr,  # [P, C] or None
    y_ptr,  # [P, C]
    eps,
    positions,
    pixels,
    channel_groups,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = ACT(bn(x)) * scale * keep + residual, rounded once."""
    channels = channel_groups * VEC
    n_c = tl.cdiv(channels, BLOCK_C)
    o_p, m_p = image_positions(tl.program_id(0) // n_c, positions, INT64, BLOCK_P)
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_x = o_p[:, None] * channels + o_c[None, :]
    m_x = m_p[:, None] & m_c[None, :]
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    b_y = normalised(tl.load(x_ptr + o_x, mask=m_x, other=0.0), b_mean, b_slope, b_beta, m_x, ACT)
    if scale_ptr is not None:
        b_y *= tl.load(scale_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if keep_ptr is not None:
        b_y *= tl.load(keep_ptr + o_p // pixels, mask=m_p, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        b_y += tl.load(residual_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_x, b_y.to(y_ptr.dtype.element_ty), mask=m_x)


def build(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,  # [C]
    keep: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [N, C, H, W]
    config: PositionsConfig | None = None,
    int64: bool | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it."""
    x = nhwc(x)
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y, []
    batch, channels, height, width = x.shape
    positions = batch * height * width
    config = config or positions_config("bn_act", positions, channels, x.dtype, x.device)
    vector = channel_vector(channels)
    launch = Launch(
        kernel=_bn_act_fwd_kernel,
        grid=(cdiv(positions, config.positions) * cdiv(channels, config.channels),),
        arguments=(
            x, mean, var, gamma, beta, layer_scale, keep, None if residual is None else nhwc(residual), y, eps,
            positions, height * width, channels // vector,
        ),
        constants={
            "ACT": act,
            "VEC": vector,
            "INT64": needs_int64(x) if int64 is None else int64,
            "BLOCK_P": config.positions,
            "BLOCK_C": config.channels,
        },
        config=config,
    )  # fmt: skip
    return y, [launch]


def bn_act(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others), memory_format_of(x))
