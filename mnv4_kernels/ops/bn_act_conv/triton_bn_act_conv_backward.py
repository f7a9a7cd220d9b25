"""Triton kernels and launchers of `bn_act_conv_backward`, and of `bn_act_pwconv_backward`, which is one tap of it.

Both products form the result's gradient while they read it, so that it never exists in memory: one
product for dx, by phases of the stride and so without multiplying zeros; one for dweight.
"""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..gpu.config import GemmConfig, SplitConfig
from ..gpu.device import dot, grouped_tile, output_pixels
from ..gpu.launch import (
    SIZES,
    Gradients,
    Launch,
    answer,
    cdiv,
    channel_vector,
    dot_precision,
    geometry_constants,
    needs_int64,
    nhwc,
)
from ..gpu.normalise import activate_backward, moments_gradient, normalisation, result_gradient, through_moments
from ..gpu.reduction import finish, join_sums
from ..gpu.select import split_config, training_gemm_config
from ..gpu.taps import GATHERED_CHANNELS, activated_tile, reduction_columns
from ..layout import memory_format_of
from .reference import backward_reference


@triton.jit(do_not_specialize=SIZES)
def _bn_act_conv_bwd_dx_kernel(
    grad_ptr,  # [N, OH, OW, K]
    grad_mean_ptr,  # [K] or None
    grad_var_ptr,  # [K] or None
    z_ptr,  # [N, OH, OW, K] or None
    z_mean_ptr,  # [K] or None
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    w_ptr,  # [K, kh, kw, C]
    dx_ptr,  # [N, H, W, C]
    partial_ptr,  # [tiles, 2, C] of this phase, or None
    eps,
    count,
    m,
    height,
    width,
    phase_h,
    phase_w,
    channel_groups,
    output_groups,
    out_h,
    out_w,
    shift_h,
    shift_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PHASE_H: tl.constexpr,
    PHASE_W: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    EVERY_H: tl.constexpr,
    EVERY_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MOVE_H: tl.constexpr,
    MOVE_W: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dx = (dz conv^T w) ACT' slope at the input pixels of one phase of the stride, which few taps reach."""
    channels = channel_groups * VEC_C
    outputs = output_groups * VEC_K
    i_m, i_n = grouped_tile(tl.cdiv(m, BLOCK_M), tl.cdiv(channels, BLOCK_N), GROUP_M)
    _, o_image, o_y, o_x, m_m = output_pixels(i_m, m, phase_h, phase_w, INT64, BLOCK_M)
    o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = o_c < channels
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    n_k = tl.cdiv(outputs, BLOCK_K)
    for i_step in range(TAPS_H * TAPS_W * n_k):
        i_tap = i_step // n_k
        j_h, j_w = i_tap // TAPS_W, i_tap % TAPS_W
        tap = (FIRST_H + j_h * EVERY_H) * KERNEL_W + FIRST_W + j_w * EVERY_W
        oh = o_y + shift_h - j_h * MOVE_H
        ow = o_x + shift_w - j_w * MOVE_W
        o_k = (i_step % n_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = o_k < outputs
        m_z = m_m & (oh >= 0) & (oh < out_h) & (ow >= 0) & (ow < out_w)
        o_z = (((o_image * out_h + oh) * out_w + ow) * outputs)[:, None] + o_k[None, :]
        b_mean, b_by_mean, b_by_var = through_moments(grad_mean_ptr, grad_var_ptr, z_mean_ptr, count, o_k, m_k)
        b_dz = result_gradient(grad_ptr, z_ptr, o_z, m_z[:, None] & m_k[None, :], b_by_mean, b_by_var, b_mean)
        p_w = w_ptr + (o_k * (KERNEL_H * KERNEL_W * channels))[:, None] + tap * channels + o_c[None, :]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_c[None, :], other=0.0)
        acc = dot(b_dz.to(x_ptr.dtype.element_ty), b_w, acc, PRECISION)
    o_in = (((o_image * height + o_y * STRIDE_H + PHASE_H) * width + o_x * STRIDE_W + PHASE_W) * channels)[:, None]
    o_in += o_c[None, :]
    m_x = m_m[:, None] & m_c[None, :]
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    b_centred = tl.load(x_ptr + o_in, mask=m_x, other=0.0).to(tl.float32) - b_mean[None, :]
    b_d = activate_backward(acc, b_centred * b_slope[None, :] + b_beta[None, :], ACT)
    tl.store(dx_ptr + o_in, (b_d * b_slope[None, :]).to(dx_ptr.dtype.element_ty), mask=m_x)
    if partial_ptr is not None:
        b_d = tl.where(m_x, b_d, 0.0)
        p_sums = partial_ptr + i_m.to(tl.int64) * 2 * channels + o_c
        tl.store(p_sums, tl.sum(b_d, 0), mask=m_c)
        tl.store(p_sums + channels, tl.sum(b_d * b_centred, 0), mask=m_c)


# of sizes whose divisors it does not know it spills, 8 to 32 bytes a lane on sm_80 and sm_90
@triton.jit
def _bn_act_conv_bwd_dw_kernel(
    grad_ptr,  # [N, OH, OW, K]
    grad_mean_ptr,  # [K] or None
    grad_var_ptr,  # [K] or None
    z_ptr,  # [N, OH, OW, K] or None
    z_mean_ptr,  # [K] or None
    x_ptr,  # [N, H, W, C]; GATHERED: in any strides
    mean_ptr,  # [C] or None
    var_ptr,  # [C] or None
    gamma_ptr,  # [C] or None
    beta_ptr,  # [C] or None
    partial_ptr,  # [parts, K, C, kh, kw]
    eps,
    count,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    m,
    part,
    height,
    width,
    channel_groups,
    output_groups,
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
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC_C: tl.constexpr,
    VEC_K: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz^T ACT(bn(x)) over `part` blocks of output pixels: [BLOCK_N, BLOCK_K] of dweight, under one tap or gathered."""
    channels = channel_groups * VEC_C
    outputs = output_groups * VEC_K
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    n_n = tl.cdiv(outputs, BLOCK_N)
    tap, o_c, m_c, _ = reduction_columns(tl.program_id(0) // n_n, channels, TAPS, GATHERED, BLOCK_K)
    o_n = (tl.program_id(0) % n_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    b_mean, b_slope, b_beta = normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c)
    b_z_mean, b_by_mean, b_by_var = through_moments(grad_mean_ptr, grad_var_ptr, z_mean_ptr, count, o_n, m_n)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    i_part = tl.program_id(1)
    for i_block in range(i_part * part, min((i_part + 1) * part, tl.cdiv(m, BLOCK_M))):
        o_m, o_image, o_oh, o_ow, m_m = output_pixels(i_block, m, out_h, out_w, INT64, BLOCK_M)
        o_z = (o_m * outputs)[:, None] + o_n[None, :]
        b_dz = result_gradient(grad_ptr, z_ptr, o_z, m_m[:, None] & m_n[None, :], b_by_mean, b_by_var, b_z_mean)
        b_a = activated_tile(
            x_ptr, mean_ptr, b_mean, b_slope, b_beta, stride_xn, stride_xc, stride_xh, stride_xw,
            o_image, o_oh * STRIDE_H - PAD_T, o_ow * STRIDE_W - PAD_L, m_m, tap, o_c, m_c, height, width, channels,
            KERNEL_W, DILATION_H, DILATION_W, ACT, GATHERED,
        )  # fmt: skip
        acc = dot(tl.trans(b_dz.to(x_ptr.dtype.element_ty)), b_a, acc, PRECISION)
    p_partial = partial_ptr + i_part.to(tl.int64) * outputs * channels * TAPS
    o_column = o_c[None, :] * TAPS + tap
    tl.store(p_partial + (o_n * (channels * TAPS))[:, None] + o_column, acc, mask=m_n[:, None] & m_c[None, :])


def build(
    grad: torch.Tensor,  # [N, K, OH, OW]
    grad_mean: torch.Tensor | None,  # [K]
    grad_var: torch.Tensor | None,  # [K]
    z: torch.Tensor | None,  # [N, K, OH, OW]
    z_mean: torch.Tensor | None,  # [K]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    config: GemmConfig | None = None,
    split: SplitConfig | None = None,
    int64: bool | None = None,
    op: str = "bn_act_conv_backward",
) -> tuple[Gradients, list[Launch]]:
    """(dx in channels_last memory, dmean, dvar, dgamma, dbeta, dweight), not yet written, and the launches."""
    result = (nhwc(grad), *moments_gradient(grad_mean, grad_var, z, z_mean))
    norm = (mean, var, gamma, beta)
    geometry = (weight, stride, padding, dilation)
    empty = x.new_empty(0)
    found: list[torch.Tensor] = [empty] * 6
    launches: list[Launch] = []
    if need_input:
        found[:5], launches = _input_launches(result, nhwc(x), norm, eps, act, *geometry, config, int64, op)
    if need_weight:
        found[5], more = _weight_launches(result, x, norm, eps, act, *geometry, split, int64, op)
        launches += more
    return tuple(found), launches


def _input_launches(
    result: tuple[torch.Tensor | None, ...],  # grad, grad_mean, grad_var, z, z_mean
    x: torch.Tensor,  # channels_last
    norm: tuple[torch.Tensor | None, ...],  # mean, var, gamma, beta
    eps: float,
    act: str,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: GemmConfig | None,
    int64: bool | None,
    op: str,
) -> tuple[list[torch.Tensor], list[Launch]]:
    batch, channels, height, width = x.shape
    grad: Any = result[0]
    outputs, out_h, out_w = grad.shape[1:]
    kernel = (weight.shape[2], weight.shape[3])
    dx = torch.empty_like(x)
    rows = _phases(height, kernel[0], stride[0], padding[0], dilation[0])
    columns = _phases(width, kernel[1], stride[1], padding[2], dilation[1])
    # one config for all phases, that of the largest
    m, taps = batch * rows[0]["size"] * columns[0]["size"], cdiv(kernel[0], stride[0]) * cdiv(kernel[1], stride[1])
    config = config or training_gemm_config(op, m, channels, outputs, x.dtype, x.device, taps)
    tiles = [cdiv(batch * row["size"] * column["size"], config.block_m) for row in rows for column in columns]
    normalises = norm[0] is not None
    partial = x.new_empty((sum(tiles), 2, channels), dtype=torch.float32) if normalises else None
    vector_c, vector_k = channel_vector(channels), channel_vector(outputs)
    weight = weight.permute(0, 2, 3, 1).contiguous()
    launches: list[Launch] = []
    first = 0
    for row in rows:
        for column in columns:
            count = tiles[len(launches)]
            launches.append(
                Launch(
                    kernel=_bn_act_conv_bwd_dx_kernel,
                    grid=(count * cdiv(channels, config.block_n),),
                    arguments=(
                        *result, x, *norm, weight, dx, None if partial is None else partial[first : first + count],
                        eps, float(batch * out_h * out_w), batch * row["size"] * column["size"], height, width,
                        row["size"], column["size"], channels // vector_c, outputs // vector_k, out_h, out_w,
                        row["shift"], column["shift"],
                    ),
                    constants={
                        "KERNEL_H": kernel[0],
                        "KERNEL_W": kernel[1],
                        "STRIDE_H": stride[0],
                        "STRIDE_W": stride[1],
                        **{
                            f"{name.upper()}_{axis}": phase[name]
                            for axis, phase in (("H", row), ("W", column))
                            for name in ("phase", "first", "every", "taps", "move")
                        },
                        "ACT": act,
                        "PRECISION": dot_precision(x),
                        "VEC_C": vector_c,
                        "VEC_K": vector_k,
                        "INT64": needs_int64(x, grad) if int64 is None else int64,
                        "BLOCK_M": config.block_m,
                        "BLOCK_N": config.block_n,
                        "BLOCK_K": config.block_k,
                        "GROUP_M": config.group_m,
                    },
                    config=config,
                )
            )  # fmt: skip
            first += count
    vectors = [torch.empty_like(value) if normalises and value is not None else None for value in norm]
    if partial is not None:
        sums, joins = join_sums(partial)
        launches += [*joins, finish(sums, norm[1], norm[2], vectors, None, eps)]
    return [dx, *(x.new_empty(0) if value is None else value for value in vectors)], launches


def _phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[dict[str, int]]:
    """The inputs of an axis by their remainder: which taps reach them, and which output lies under the first of those.

    Input `phase + i * stride` meets tap `first + j * every` at output `i + shift - j * move`.
    """
    found = []
    for phase in range(min(stride, size)):
        taps = [tap for tap in range(kernel) if (phase + padding - tap * dilation) % stride == 0]
        first = taps[0] if taps else 0
        every = taps[1] - first if len(taps) > 1 else 1
        found.append(
            {
                "phase": phase,
                "size": cdiv(size - phase, stride),
                "first": first,
                "every": every,
                "taps": len(taps),
                "shift": (phase + padding - first * dilation) // stride,
                "move": every * dilation // stride,
            }
        )
    return found


def _weight_launches(
    result: tuple[torch.Tensor | None, ...],  # grad, grad_mean, grad_var, z, z_mean
    x: torch.Tensor,
    norm: tuple[torch.Tensor | None, ...],  # mean, var, gamma, beta
    eps: float,
    act: str,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: SplitConfig | None,
    int64: bool | None,
    op: str,
) -> tuple[torch.Tensor, list[Launch]]:
    batch, channels, height, width = x.shape
    grad: Any = result[0]
    outputs, out_h, out_w = grad.shape[1:]
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    gathered = channels < GATHERED_CHANNELS and taps > 1
    x = x if gathered else nhwc(x)
    m = batch * out_h * out_w
    columns, taps_apart = (taps * channels, 1) if gathered else (channels, taps)
    config = config or split_config(op, m, outputs, columns, x.dtype, x.device, taps_apart)
    blocks = cdiv(m, config.block_m)
    part = cdiv(blocks, config.parts)
    parts = cdiv(blocks, part)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    partial = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    vector_c, vector_k = channel_vector(channels), channel_vector(outputs)
    launch = Launch(
        kernel=_bn_act_conv_bwd_dw_kernel,
        grid=(cdiv(outputs, config.block_n) * cdiv(columns, config.block_k) * taps_apart, parts),
        arguments=(
            *result, x, *norm, partial, eps, float(m), *x.stride(), m, part, height, width,
            channels // vector_c, outputs // vector_k, out_h, out_w,
        ),
        constants={
            **geometry_constants(kernel, stride, padding, dilation),
            "ACT": act,
            "GATHERED": gathered,
            "PRECISION": dot_precision(x),
            "VEC_C": vector_c,
            "VEC_K": vector_k,
            "INT64": needs_int64(x, grad) if int64 is None else int64,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        },
        config=config,
    )  # fmt: skip
    _, joins = join_sums(partial, dweight)
    return dweight, [launch, *joins]


def bn_act_conv_backward(*arguments: Any) -> Gradients:
    """CUDA implementation of the op; maps are converted to NHWC, and dx goes back to x's format."""
    x = arguments[5]
    if x.numel() == 0:
        return backward_reference(*arguments)
    return answer(build(*arguments), memory_format_of(x))
