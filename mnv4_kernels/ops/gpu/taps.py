"""Triton device functions of dense convolutions that train: tiles of the activated input under a tap."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .normalise import normalised

#: Below this, channels of all taps form one reduction axis that is gathered; an image has 1, 3 or 4.
GATHERED_CHANNELS = 16


@triton.jit
def reduction_columns(i_block, channels, TAPS: tl.constexpr, GATHERED: tl.constexpr, BLOCK_K: tl.constexpr):
    """(tap, channel [K], mask [K], column of the weight [K]) of a block of the axis (tap, channel).

    A block lies under one tap, a scalar; GATHERED: under as many as it reaches, [1, K].
    """
    o_k = tl.arange(0, BLOCK_K)
    if GATHERED:
        o_w = i_block * BLOCK_K + o_k
        m_k = o_w < TAPS * channels
        tap = (o_w // channels)[None, :]
        o_c = o_w % channels
    else:
        n_k = tl.cdiv(channels, BLOCK_K)
        tap = i_block // n_k
        o_c = (i_block % n_k) * BLOCK_K + o_k
        m_k = o_c < channels
        o_w = tap * channels + o_c
    return tap, o_c, m_k, o_w


@triton.jit
def activated_tile(
    x_ptr,  # [N, H, W, C]; GATHERED: in any strides
    mean_ptr,  # [C] or None: b_mean, b_slope and b_beta count
    b_mean,  # [K]
    b_slope,  # [K]
    b_beta,  # [K]
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    o_image,  # [P]
    o_ih,  # [P] input row under the first tap
    o_iw,  # [P] input column under the first tap
    m_p,  # [P]
    tap,  # scalar or [1, K]
    o_c,  # [K]
    m_c,  # [K]
    height,
    width,
    channels,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACT: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """ACT(bn(x)) [P, K] in x's dtype, 0 beyond the edges."""
    ih = o_ih[:, None] + (tap // KERNEL_W) * DILATION_H
    iw = o_iw[:, None] + (tap % KERNEL_W) * DILATION_W
    m_x = m_p[:, None] & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width) & m_c[None, :]
    if GATHERED:
        p_x = x_ptr + (o_image * stride_xn)[:, None] + ih * stride_xh + iw * stride_xw + (o_c * stride_xc)[None, :]
    else:
        p_x = x_ptr + (((o_image * height)[:, None] + ih) * width + iw) * channels + o_c[None, :]
    b_a = tl.load(p_x, mask=m_x, other=0.0)
    if mean_ptr is not None or ACT != "none":
        b_a = normalised(b_a, b_mean, b_slope, b_beta, m_x, ACT).to(x_ptr.dtype.element_ty)
    return b_a
