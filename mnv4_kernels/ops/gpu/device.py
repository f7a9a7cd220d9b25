"""Triton device functions of every kernel: activations and the epilogue."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):
    """ACT(x) for x float32; NaN stays NaN, as in eager."""
    if ACT == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
    elif ACT == "relu6":
        y = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    elif ACT == "hard_swish":
        gate = x + 3.0
        y = x * tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate)) * (1.0 / 6.0)
    elif ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 u), which needs one exponential instead of a tanh
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        y = x
    return y


@triton.jit
def scale_shift(
    x,  # [A, B] float32
    scale_ptr,  # [channels] or None
    shift_ptr,  # [channels] or None
    o_b,  # [B] channel of each column
    m_b,  # [B]
    ACT: tl.constexpr,
):
    """ACT(x * scale + shift), per column."""
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + o_b, mask=m_b, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        x += tl.load(shift_ptr + o_b, mask=m_b, other=0.0).to(tl.float32)[None, :]
    return activate(x, ACT)


@triton.jit
def _store_columns(
    acc,  # [A, B] float32
    scale_ptr,
    shift_ptr,
    gamma_ptr,
    residual_ptr,
    y_ptr,
    o_row,  # [A] element offset of each row of y
    m_row,  # [A]
    o_b,  # [B]
    m_b,  # [B]
    ACT: tl.constexpr,
):
    acc = scale_shift(acc, scale_ptr, shift_ptr, o_b, m_b, ACT)
    if gamma_ptr is not None:
        acc *= tl.load(gamma_ptr + o_b, mask=m_b, other=0.0).to(tl.float32)[None, :]
    o_y = o_row[:, None] + o_b[None, :]
    m_y = m_row[:, None] & m_b[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_y, acc.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def store_epilogue(
    acc,  # [A, B] float32
    scale_ptr,  # [channels] or None
    shift_ptr,  # [channels] or None
    gamma_ptr,  # [channels] or None
    residual_ptr,  # same layout as y, or None
    y_ptr,
    o_row,  # [A] element offset of each row of y
    m_row,  # [A]
    b0,  # first channel
    channels,
    ACT: tl.constexpr,
):
    """y = ACT(acc * scale + shift) * gamma + residual, rounded once to y's dtype.

    A tile of 256 columns goes in two halves: the residual and the addresses of a whole one spill.
    """
    A: tl.constexpr = acc.shape[0]
    B: tl.constexpr = acc.shape[1]
    if B >= 256:
        left, right = tl.split(tl.permute(tl.reshape(acc, [A, 2, B // 2]), (0, 2, 1)))
        o_b = b0 + tl.arange(0, B // 2)
        _store_columns(
            left, scale_ptr, shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_row, m_row, o_b, o_b < channels, ACT
        )
        o_b += B // 2
        _store_columns(
            right, scale_ptr, shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_row, m_row, o_b, o_b < channels, ACT
        )
    else:
        o_b = b0 + tl.arange(0, B)
        _store_columns(
            acc, scale_ptr, shift_ptr, gamma_ptr, residual_ptr, y_ptr, o_row, m_row, o_b, o_b < channels, ACT
        )


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32, `b` in a's dtype; see `dot_precision` for PRECISION."""
    if PRECISION == "widened":
        acc = tl.dot(a.to(tl.float32), b.to(a.dtype).to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def output_pixels(i_m, m, out_h, out_w, INT64: tl.constexpr, BLOCK_M: tl.constexpr):
    """(row of y, image, output y, output x, mask) of BLOCK_M output pixels."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < m
    if INT64:
        o_m = o_m.to(tl.int64)
    o_line = o_m // out_w
    return o_m, o_line // out_h, o_line % out_h, o_m % out_w, m_m


@triton.jit
def grouped_tile(n_m, n_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of this program, GROUP_M row tiles at a time so that both operands stay in L2."""
    i_tile = tl.program_id(0)
    width = GROUP_M * n_n
    i_group = i_tile // width
    first = i_group * GROUP_M
    size = min(n_m - first, GROUP_M)
    return first + (i_tile % width) % size, (i_tile % width) // size
