"""Triton kernels and launcher of `bn_act_dwconv_backward`: all gradients from one pass over the input."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import PositionsConfig
from ..gpu.launch import (
    SIZES,
    Gradients,
    Launch,
    answer,
    cdiv,
    channel_vector,
    geometry_constants,
    needs_int64,
    nhwc,
    tap_major,
)
from ..gpu.normalise import (
    activate_backward,
    moments_gradient,
    normalisation,
    normalised,
    result_gradient,
    through_moments,
)
from ..gpu.reduction import finish, join_sums
from ..gpu.select import depthwise_backward_config
from ..layout import memory_format_of
from .reference import backward_reference


@triton.jit(do_not_specialize=SIZES)
def _bn_act_dwconv_bwd_kernel(
    grad_ptr,  # [N, OH, OW, C]
    grad_mean_ptr,  # [C] or None
    grad_var_ptr,  # [C] or None
    z_ptr,  # [N, OH, OW, C] or None
    z_mean_ptr,  # [C] or None
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w_ptr,  # [kh, kw, C]
    dx_ptr,  # [N, H, W, C] or None
    partial_ptr,  # [tiles, rows, C]: dweight's taps if there are, then the two sums of the normalisation
    eps,
    count,
    positions,
    rows,
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
    NEED_WEIGHT: tl.constexpr,
    VEC: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of input pixels: each tap's result gradient, formed while it is read, serves dx and dweight."""
    channels = channel_groups * VEC
    n_c = tl.cdiv(channels, BLOCK_C)
    i_tile = tl.program_id(0) // n_c
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < positions
    if INT64:
        o_p = o_p.to(tl.int64)
    o_c = (tl.program_id(0) % n_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    m_x = m_p[:, None] & m_c[None, :]
    o_iw = o_p % width
    o_ih = (o_p // width) % height
    o_image = (o_p // width) // height * out_h
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    b_z_mean, b_by_mean, b_by_var = through_moments(grad_mean_ptr, grad_var_ptr, z_mean_ptr, count, o_c, m_c)
    o_x = o_p[:, None] * channels + o_c[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_a = normalised(b_x, b_mean, b_slope, b_beta, m_x, ACT)
    p_partial = partial_ptr + i_tile.to(tl.int64) * rows * channels + o_c
    b_da = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # not unrolled: one tap's tiles are alive at a time
    for tap in range(KERNEL_H * KERNEL_W):
        top = o_ih + PAD_T - (tap // KERNEL_W) * DILATION_H
        left = o_iw + PAD_L - (tap % KERNEL_W) * DILATION_W
        oh, ow = top // STRIDE_H, left // STRIDE_W
        m_z = m_p & (top >= 0) & (left >= 0) & (oh < out_h) & (ow < out_w)
        m_z = m_z & (oh * STRIDE_H == top) & (ow * STRIDE_W == left)
        o_z = (((o_image + oh) * out_w + ow) * channels)[:, None] + o_c[None, :]
        m_z2 = m_z[:, None] & m_c[None, :]
        b_grad = result_gradient(grad_ptr, z_ptr, o_z, m_z2, b_by_mean, b_by_var, b_z_mean)
        if NEED_WEIGHT:
            tl.store(p_partial + tap * channels, tl.sum(b_grad * b_a, 0), mask=m_c)
        if dx_ptr is not None:
            b_w = tl.load(w_ptr + tap * channels + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_da += b_grad * b_w[None, :]
    if dx_ptr is not None:
        b_centred = b_x - b_mean[None, :]
        b_d = activate_backward(b_da, b_centred * b_slope[None, :] + b_beta[None, :], ACT)
        tl.store(dx_ptr + o_x, (b_d * b_slope[None, :]).to(dx_ptr.dtype.element_ty), mask=m_x)
        if mean_ptr is not None:
            b_d = tl.where(m_x, b_d, 0.0)
            p_sums = p_partial + (rows - 2) * channels
            tl.store(p_sums, tl.sum(b_d, 0), mask=m_c)
            tl.store(p_sums + channels, tl.sum(b_d * b_centred, 0), mask=m_c)


def build(
    grad: torch.Tensor,  # [N, C, OH, OW]
    grad_mean: torch.Tensor | None,  # [C]
    grad_var: torch.Tensor | None,  # [C]
    z: torch.Tensor | None,  # [N, C, OH, OW]
    z_mean: torch.Tensor | None,  # [C]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [C, 1, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    config: PositionsConfig | None = None,
    int64: bool | None = None,
) -> tuple[Gradients, list[Launch]]:
    """(dx in channels_last memory, dmean, dvar, dgamma, dbeta, dweight), not yet written, and the launches."""
    x, grad = nhwc(x), nhwc(grad)
    batch, channels, height, width = x.shape
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    empty = x.new_empty(0)
    dx = torch.empty_like(x) if need_input else None
    normalises = need_input and mean is not None
    vectors = [
        torch.empty_like(value) if normalises and value is not None else None for value in (mean, var, gamma, beta)
    ]
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    result = tuple(empty if value is None else value for value in (dx, *vectors, dweight))
    positions = batch * height * width
    config = config or depthwise_backward_config(tuple(x.shape), kernel, (stride[0], stride[1]), x.dtype, x.device)
    vector = channel_vector(channels)
    tiles = cdiv(positions, config.positions)
    rows = taps * need_weight + 2 * normalises
    partial = x.new_empty((tiles, rows, channels), dtype=torch.float32)
    launch = Launch(
        kernel=_bn_act_dwconv_bwd_kernel,
        grid=(tiles * cdiv(channels, config.channels),),
        arguments=(
            grad, *moments_gradient(grad_mean, grad_var, z, z_mean), x, mean, var, gamma, beta, tap_major(weight), dx,
            partial, eps, float(batch * grad.shape[2] * grad.shape[3]), positions, rows, height, width,
            channels // vector, grad.shape[2], grad.shape[3],
        ),
        constants={
            **geometry_constants(kernel, stride, padding, dilation),
            "ACT": act,
            "NEED_WEIGHT": need_weight,
            "VEC": vector,
            "INT64": needs_int64(x, grad) if int64 is None else int64,
            "BLOCK_P": config.positions,
            "BLOCK_C": config.channels,
        },
        config=config,
    )  # fmt: skip
    if rows == 0:
        return result, [launch]
    sums, joins = join_sums(partial)
    last = finish(sums, var, gamma, vectors, dweight, eps, taps)
    return result, [launch, *joins, last]


def bn_act_dwconv_backward(*arguments: Any) -> Gradients:
    """CUDA implementation of the op; maps are converted to NHWC, and dx goes back to x's format."""
    x = arguments[5]
    if x.numel() == 0:
        return backward_reference(*arguments)
    return answer(build(*arguments), memory_format_of(x))
