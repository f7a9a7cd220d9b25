"""Sums over pixels in two or more launches: parts that the shape alone decides, joined in order. No atomics."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import Config
from .launch import Launch, cdiv, next_power_of_2

#: parts that one program joins, and the channels that it joins them of
PARTS = 128
CHANNELS = 32

_JOIN = Config(warps=4, stages=1)


@triton.jit
def store_moments(partial_ptr, i_part, o_c, m_c, channels, b_sum, b_square, count):
    """Writes a part's (mean, sum of squares about it, count) of [parts, 3, channels]."""
    p = partial_ptr + i_part * 3 * channels + o_c
    tl.store(p, b_sum, mask=m_c)
    tl.store(p + channels, b_square, mask=m_c)
    tl.store(p + 2 * channels, tl.zeros_like(b_sum) + count, mask=m_c)


@triton.jit
def store_tile_moments(partial_ptr, i_part, b_z, m_p, o_c, m_c, channels):
    """The same of a float32 tile [P, C], about its own mean: a mean far from zero costs no digits."""
    m_z = m_p[:, None] & m_c[None, :]
    count = tl.sum(m_p.to(tl.float32), 0)
    b_average = tl.sum(tl.where(m_z, b_z, 0.0), 0) / count
    b_apart = tl.where(m_z, b_z - b_average[None, :], 0.0)
    store_moments(partial_ptr, i_part, o_c, m_c, channels, b_average, tl.sum(b_apart * b_apart, 0), count)


@triton.jit
def _join_moments_kernel(
    partial_ptr,  # [parts, 3, C]: mean, sum of squares about it, count
    joined_ptr,  # [programs, 3, C], or None
    mean_ptr,  # [C], or None
    var_ptr,  # [C], or None
    parts,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Chan's formula for PARTS parts at once; the last launch writes the mean and the biased variance."""
    o_t = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    mask = (o_t < parts)[:, None] & m_c[None, :]
    p = partial_ptr + o_t[:, None].to(tl.int64) * 3 * channels + o_c[None, :]
    b_mean = tl.load(p, mask=mask, other=0.0)
    b_square = tl.load(p + channels, mask=mask, other=0.0)
    b_count = tl.load(p + 2 * channels, mask=mask, other=0.0)
    count = tl.maximum(tl.sum(b_count, 0), 1.0)
    mean = tl.sum(b_count * b_mean, 0) / count
    b_apart = b_mean - mean[None, :]
    square = tl.sum(b_square + b_count * b_apart * b_apart, 0)
    if joined_ptr is not None:
        store_moments(joined_ptr, tl.program_id(0).to(tl.int64), o_c, m_c, channels, mean, square, count)
    else:
        tl.store(mean_ptr + o_c, mean, mask=m_c)
        tl.store(var_ptr + o_c, square / count, mask=m_c)


@triton.jit
def _join_sums_kernel(
    partial_ptr,  # [parts, columns]
    joined_ptr,  # [programs, columns]
    parts,
    columns,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The sums of PARTS parts at once."""
    n_c = tl.cdiv(columns, CHANNELS)
    i_program = tl.program_id(0) // n_c
    o_t = i_program * PARTS + tl.arange(0, PARTS)
    o_c = (tl.program_id(0) % n_c) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < columns
    p = partial_ptr + o_t[:, None].to(tl.int64) * columns + o_c[None, :]
    b_sum = tl.sum(tl.load(p, mask=(o_t < parts)[:, None] & m_c[None, :], other=0.0), 0)
    p_joined = joined_ptr + i_program.to(tl.int64) * columns + o_c
    tl.store(p_joined, b_sum.to(joined_ptr.dtype.element_ty), mask=m_c)


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


def join_moments(partial: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> list[Launch]:
    """Launches that write `mean` and `var` [C] of the parts [parts, 3, C]."""
    launches = []
    while True:
        parts, _, channels = partial.shape
        programs = cdiv(parts, PARTS)
        joined = None if programs == 1 else partial.new_empty(programs, 3, channels)
        last = (None, mean, var) if joined is None else (joined, None, None)
        launches.append(
            Launch(
                kernel=_join_moments_kernel,
                grid=(programs, cdiv(channels, CHANNELS)),
                arguments=(partial, *last, parts, channels),
                constants={"PARTS": PARTS, "CHANNELS": CHANNELS},
                config=_JOIN,
            )
        )
        if joined is None:
            return launches
        partial = joined


def join_sums(partial: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Launch]]:
    """(the sums [...], the launches that write them) of the parts [parts, ...].

    With `out`, dense and of as many elements, the last launch writes them there, rounded to its dtype.
    """
    launches: list[Launch] = []
    while True:
        parts, *shape = partial.shape
        if parts == 1 and out is None:
            return partial[0], launches
        programs = cdiv(parts, PARTS)
        last = programs == 1 and out is not None
        joined = out if last and out is not None else partial.new_empty(programs, *shape)
        columns = partial[0].numel()
        launches.append(
            Launch(
                kernel=_join_sums_kernel,
                grid=(programs * cdiv(columns, CHANNELS),),
                arguments=(partial, joined, parts, columns),
                constants={"PARTS": PARTS, "CHANNELS": CHANNELS},
                config=_JOIN,
            )
        )
        if last:
            return joined, launches
        partial = joined


def finish(
    sums: torch.Tensor,  # [rows, C]: of each tap, then of the activation's gradient and of it times the centred input
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    vectors: Sequence[torch.Tensor | None],  # gradients [C] of mean, var, gamma, beta
    dweight: torch.Tensor | None,  # [C, taps]
    eps: float,
    taps: int = 1,
) -> Launch:
    """The launch that writes the gradients of a normalisation, and of what has a value for each channel and tap."""
    rows, channels = sums.shape
    return Launch(
        kernel=_finish_kernel,
        grid=(cdiv(channels, CHANNELS),),
        arguments=(sums, var, gamma, *vectors, dweight, eps, rows, channels),
        constants={"TAPS": taps, "BLOCK_T": next_power_of_2(taps), "BLOCK_C": CHANNELS},
        config=_JOIN,
    )
