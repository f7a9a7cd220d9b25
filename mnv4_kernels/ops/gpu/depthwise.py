"""The depthwise convolution as a device function: the body of `dwconv_bn_act` and the producer of fused GEMMs."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .normalise import normalised


@triton.constexpr_function
def _feeds_an_output(row, kernel, stride, dilation, rows):
    """Whether an input row lies under a tap of any output row: with dilations and strides, not all do."""
    return any(row == out * stride + tap * dilation for out in range(rows) for tap in range(kernel))


@triton.jit
def output_columns(i_tile, columns, n_strips, out_w, INT64: tl.constexpr, BLOCK_P: tl.constexpr):
    """Decodes BLOCK_P output columns; a column is (image, strip of ROWS output rows, output x).

    Strips of all images share one axis, so that a 7-wide map wastes no lane.
    """
    o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < columns
    if INT64:
        o_p = o_p.to(tl.int64)
    o_ow = o_p % out_w
    i_strip = o_p // out_w
    return i_strip // n_strips, i_strip % n_strips, o_ow, m_p


@triton.jit
def depthwise_rows(
    x_ptr,  # [N, H, W, C]
    w_ptr,  # [kh, kw, C]
    i_n,  # [P] image of each column
    o_oh,  # [P] first output row of each column
    o_ow,  # [P] output x of each column
    m_p,  # [P]
    o_c,  # [C] channels
    m_c,  # [C]
    height,
    width,
    channels,
    PAD_T: tl.constexpr,
    PAD_L: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    b_mean,  # [C] of a normalisation of x, or None, with
    b_slope,  # [C] and
    b_beta,  # [C]
    # applied to the normalised x; no default: Triton 3.6 takes none that is a string
    ACT: tl.constexpr,
):
    """ROWS float32 tiles [P, C]: output rows o_oh ... o_oh + ROWS - 1 of each column.

    An input element feeds up to KERNEL_H output rows from registers; it is loaded once per kernel
    column, from L1 after the first. The kernel column is a loop that is not unrolled, so that only
    KERNEL_H weight vectors are alive at a time: unrolled, ptxas keeps all of them and spills at 5 x 5.
    """
    IN_ROWS: tl.constexpr = (ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1
    o_ih = o_oh * STRIDE_H - PAD_T
    o_iw = o_ow * STRIDE_W - PAD_L
    p_image = x_ptr + (i_n * height * width * channels)[:, None] + o_c[None, :]
    acc = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * ROWS
    for kx in range(KERNEL_W):
        iw = o_iw + kx * DILATION_W
        m_column = m_p & (iw >= 0) & (iw < width)
        b_w = ()
        for ky in tl.static_range(KERNEL_H):
            p_w = w_ptr + (ky * KERNEL_W + kx) * channels + o_c
            b_w += (tl.load(p_w, mask=m_c, other=0.0).to(tl.float32)[None, :],)
        b_x = ()
        for r in tl.static_range(IN_ROWS):
            if _feeds_an_output(r, KERNEL_H, STRIDE_H, DILATION_H, ROWS):
                ih = o_ih + r
                m_x = m_column & (ih >= 0) & (ih < height)
                p_x = p_image + ((ih * width + iw) * channels)[:, None]
                m_x2 = m_x[:, None] & m_c[None, :]
                b_row = tl.load(p_x, mask=m_x2, other=0.0)
                if b_slope is not None:
                    b_row = normalised(b_row, b_mean, b_slope, b_beta, m_x2, ACT)
                b_x += (b_row,)
            else:
                b_x += (0.0,)
        summed = ()
        for row in tl.static_range(ROWS):
            b_sum = acc[row]
            for ky in tl.static_range(KERNEL_H):
                b_sum += b_x[row * STRIDE_H + ky * DILATION_H].to(tl.float32) * b_w[ky]
            summed += (b_sum,)
        acc = summed
    return acc
