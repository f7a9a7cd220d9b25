"""Triton kernels and launcher of `bn_act_dwconv_backward`: all gradients from one pass over the input."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gpu.config import Config, PositionsConfig
from ..gpu.launch import Launch, cdiv, channel_vector, in_format, needs_int64, next_power_of_2, nhwc, tap_major
from ..gpu.normalise import activate_backward, normalisation, normalised, result_gradient
from ..gpu.reduction import join_sums
from ..gpu.select import depthwise_backward_config
from ..layout import memory_format_of
from .reference import backward_reference

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

#: channels of one program of the last launch, whose work is a few rows
_CHANNELS = 32


@triton.jit
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
    b_through_mean = tl.zeros([BLOCK_C], tl.float32)
    b_through_var = tl.zeros([BLOCK_C], tl.float32)
    b_z_mean = tl.zeros([BLOCK_C], tl.float32)
    if z_ptr is not None:
        b_through_mean = tl.load(grad_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) / count
        b_through_var = tl.load(grad_var_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) * (2.0 / count)
        b_z_mean = tl.load(z_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
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
        b_grad = result_gradient(grad_ptr, z_ptr, o_z, m_z2, b_through_mean, b_through_var, b_z_mean)
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


@triton.jit
def _finish_kernel(
    sums_ptr,  # [rows, C]
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    dmean_ptr,  # [C] or None
    dvar_ptr,  # [C] or None
    dgamma_ptr,  # [C] or None
    dbeta_ptr,  # [C] or None
    dweight_ptr,  # [C, taps] or None
    eps,
    rows,
    channels,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From sums over pixels to the gradients of weight, mean, variance, gamma and beta."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    if dweight_ptr is not None:
        o_t = tl.arange(0, BLOCK_T)
        m_w = (o_t < TAPS)[:, None] & m_c[None, :]
        b_w = tl.load(sums_ptr + o_t[:, None] * channels + o_c[None, :], mask=m_w, other=0.0)
        p_w = dweight_ptr + o_c[None, :] * TAPS + o_t[:, None]
        tl.store(p_w, b_w.to(dweight_ptr.dtype.element_ty), mask=m_w)
    if dmean_ptr is not None:
        b_rstd = tl.rsqrt(tl.load(var_ptr + o_c, mask=m_c, other=1.0).to(tl.float32) + eps)
        b_slope = b_rstd
        if gamma_ptr is not None:
            b_slope = b_rstd * tl.load(gamma_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_total = tl.load(sums_ptr + (rows - 2) * channels + o_c, mask=m_c, other=0.0)
        b_spread = tl.load(sums_ptr + (rows - 1) * channels + o_c, mask=m_c, other=0.0)
        tl.store(dmean_ptr + o_c, (-b_slope * b_total).to(dmean_ptr.dtype.element_ty), mask=m_c)
        b_dvar = -0.5 * b_slope * b_rstd * b_rstd * b_spread
        tl.store(dvar_ptr + o_c, b_dvar.to(dvar_ptr.dtype.element_ty), mask=m_c)
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + o_c, (b_rstd * b_spread).to(dgamma_ptr.dtype.element_ty), mask=m_c)
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + o_c, b_total.to(dbeta_ptr.dtype.element_ty), mask=m_c)


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
    through = (None,) * 4
    if grad_mean is not None and grad_var is not None and z is not None and z_mean is not None:
        through = (grad_mean, grad_var, nhwc(z), z_mean)
    batch, channels, height, width = x.shape
    taps = weight.shape[2] * weight.shape[3]
    empty = x.new_empty(0)
    dx = torch.empty_like(x) if need_input else None
    normalises = need_input and mean is not None
    vectors = [
        torch.empty_like(value) if normalises and value is not None else None for value in (mean, var, gamma, beta)
    ]
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    result = tuple(empty if value is None else value for value in (dx, *vectors, dweight))
    positions = batch * height * width
    config = config or depthwise_backward_config(
        tuple(x.shape), (weight.shape[2], weight.shape[3]), (stride[0], stride[1]), x.dtype, x.device
    )
    vector = channel_vector(channels)
    tiles = cdiv(positions, config.positions)
    rows = taps * need_weight + 2 * normalises
    partial = x.new_empty((tiles, rows, channels), dtype=torch.float32)
    launch = Launch(
        kernel=_bn_act_dwconv_bwd_kernel,
        grid=(tiles * cdiv(channels, config.channels),),
        arguments=(
            grad, *through, x, mean, var, gamma, beta, tap_major(weight), dx, partial, eps,
            float(batch * grad.shape[2] * grad.shape[3]), positions, rows, height, width, channels // vector,
            grad.shape[2], grad.shape[3],
        ),
        constants={
            "PAD_T": padding[0],
            "PAD_L": padding[2],
            "KERNEL_H": weight.shape[2],
            "KERNEL_W": weight.shape[3],
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "DILATION_H": dilation[0],
            "DILATION_W": dilation[1],
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
        return result, [launch]  # type: ignore[return-value]
    sums, joins = join_sums(partial)
    finish = Launch(
        kernel=_finish_kernel,
        grid=(cdiv(channels, _CHANNELS),),
        arguments=(sums, var, gamma, *vectors, dweight, eps, rows, channels),
        constants={"TAPS": taps, "BLOCK_T": next_power_of_2(taps), "BLOCK_C": _CHANNELS},
        config=Config(warps=4, stages=1),
    )
    return result, [launch, *joins, finish]  # type: ignore[return-value]


def bn_act_dwconv_backward(
    grad: torch.Tensor,
    grad_mean: torch.Tensor | None,
    grad_var: torch.Tensor | None,
    z: torch.Tensor | None,
    z_mean: torch.Tensor | None,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    act: str,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, ...]:
    """CUDA implementation of the op; maps are converted to NHWC, and dx goes back to x's format."""
    arguments = (
        grad, grad_mean, grad_var, z, z_mean, x, mean, var, gamma, beta, eps, act, weight, stride, padding, dilation,
        need_input, need_weight,
    )  # fmt: skip
    if x.numel() == 0:
        return backward_reference(*arguments)
    (dx, *others), launches = build(*arguments)
    for launch in launches:
        launch.run()
    return (in_format(dx, memory_format_of(x)) if need_input else dx, *others)
