"""Triton kernel and launcher of `bn_act_backward`: dx and all sums over pixels from one pass."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import PositionsConfig
from ..gpu.device import activate
from ..gpu.launch import SIZES, Gradients, Launch, answer, cdiv, channel_vector, needs_int64, nhwc
from ..gpu.normalise import activate_backward, normalisation
from ..gpu.reduction import finish, join_sums
from ..gpu.select import positions_config
from ..layout import memory_format_of
from .reference import backward_reference
from .triton_bn_act import image_positions


@triton.jit(do_not_specialize=SIZES)
def _bn_act_bwd_kernel(
    grad_ptr,  # [P, C]
    x_ptr,  # [P, C]
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    scale_ptr,  # [C] or None
    keep_ptr,  # [N] or None
    dx_ptr,  # [P, C]
    partial_ptr,  # [tiles, rows, C]: dscale if there is one, then the two sums of the normalisation; or None
    eps,
    positions,
    pixels,
    rows,
    channel_groups,
    ACT: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = grad * scale * keep * ACT' * slope, and a row of each sum for this tile."""
    channels = channel_groups * VEC
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c
    o_p, m_p = image_positions(i_tile, positions, INT64, BLOCK_P)
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    o_x = o_p[:, None] * channels + o_c[None, :]
    m_x = m_p[:, None] & m_c[None, :]
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    b_centred = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32) - b_mean[None, :]
    b_argument = b_centred * b_slope[None, :] + b_beta[None, :]
    b_grad = tl.load(grad_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    if keep_ptr is not None:
        b_grad *= tl.load(keep_ptr + o_p // pixels, mask=m_p, other=0.0).to(tl.float32)[:, None]
    if partial_ptr is not None:
        p_sums = partial_ptr + i_tile.to(tl.int64) * rows * channels + o_c
    if scale_ptr is not None:
        b_scaled = tl.where(m_x, b_grad * activate(b_argument, ACT), 0.0)
        tl.store(p_sums, tl.sum(b_scaled, 0), mask=m_c)
        b_grad *= tl.load(scale_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_d = activate_backward(b_grad, b_argument, ACT)
    tl.store(dx_ptr + o_x, (b_d * b_slope[None, :]).to(dx_ptr.dtype.element_ty), mask=m_x)
    if mean_ptr is not None:
        b_d = tl.where(m_x, b_d, 0.0)
        tl.store(p_sums + (rows - 2) * channels, tl.sum(b_d, 0), mask=m_c)
        tl.store(p_sums + (rows - 1) * channels, tl.sum(b_d * b_centred, 0), mask=m_c)


def build(
    grad: torch.Tensor,  # [N, C, H, W]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,  # [C]
    keep: torch.Tensor | None,  # [N]
    config: PositionsConfig | None = None,
    int64: bool | None = None,
) -> tuple[Gradients, list[Launch]]:
    """(dx in channels_last memory, dmean, dvar, dgamma, dbeta, dlayer_scale), not yet written, and the launches."""
    x, grad = nhwc(x), nhwc(grad)
    batch, channels, height, width = x.shape
    positions = batch * height * width
    config = config or positions_config("bn_act_backward", positions, channels, x.dtype, x.device)
    dx = torch.empty_like(x)
    vectors = [None if value is None else torch.empty_like(value) for value in (mean, var, gamma, beta, layer_scale)]
    empty = x.new_empty(0)
    result = (dx, *(empty if value is None else value for value in vectors))
    vector = channel_vector(channels)
    tiles = cdiv(positions, config.positions)
    rows = (layer_scale is not None) + 2 * (mean is not None)
    partial = x.new_empty((tiles, rows, channels), dtype=torch.float32) if rows else None
    launch = Launch(
        kernel=_bn_act_bwd_kernel,
        grid=(tiles * cdiv(channels, config.channels),),
        arguments=(
            grad, x, mean, var, gamma, beta, layer_scale, keep, dx, partial, eps,
            positions, height * width, rows, channels // vector,
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
    if partial is None:
        return result, [launch]
    sums, joins = join_sums(partial)
    # the layer scale's gradient is one more sum a channel, as a tap's is
    return result, [launch, *joins, finish(sums, var, gamma, vectors[:4], vectors[4], eps)]


def bn_act_backward(*arguments: Any) -> Gradients:
    """CUDA implementation of the op; maps are converted to NHWC, and dx goes back to x's format."""
    x = arguments[1]
    if x.numel() == 0:
        return backward_reference(*arguments)
    return answer(build(*arguments), memory_format_of(x))
