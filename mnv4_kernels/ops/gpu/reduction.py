"""Sums over pixels in two or more launches: parts that the shape alone decides, joined in order. No atomics."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import Config
from .launch import Launch, cdiv

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
    o_t = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < columns
    p = partial_ptr + o_t[:, None].to(tl.int64) * columns + o_c[None, :]
    b_sum = tl.sum(tl.load(p, mask=(o_t < parts)[:, None] & m_c[None, :], other=0.0), 0)
    tl.store(joined_ptr + tl.program_id(0).to(tl.int64) * columns + o_c, b_sum, mask=m_c)


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


def join_sums(partial: torch.Tensor) -> tuple[torch.Tensor, list[Launch]]:
    """(the sums [R, C], the launches that write them) of the parts [parts, R, C]."""
    launches = []
    while partial.shape[0] > 1:
        parts, rows, channels = partial.shape
        joined = partial.new_empty(cdiv(parts, PARTS), rows, channels)
        launches.append(
            Launch(
                kernel=_join_sums_kernel,
                grid=(joined.shape[0], cdiv(rows * channels, CHANNELS)),
                arguments=(partial, joined, parts, rows * channels),
                constants={"PARTS": PARTS, "CHANNELS": CHANNELS},
                config=_JOIN,
            )
        )
        partial = joined
    return partial[0], launches
