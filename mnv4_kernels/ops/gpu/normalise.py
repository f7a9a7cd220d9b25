"""Triton device functions of training: the BatchNorm and activation of an input, and the way back through them."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import activate
from .launch import nhwc


@triton.jit
def normalisation(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, o_c, m_c):
    """(mean, rstd * gamma, beta) [C] of the channels, float32; 0, 1, 0 without normalisation."""
    b_mean = tl.zeros([o_c.shape[0]], tl.float32)
    b_slope = tl.full([o_c.shape[0]], 1.0, tl.float32)
    b_beta = tl.zeros([o_c.shape[0]], tl.float32)
    if mean_ptr is not None:
        b_mean = tl.load(mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_slope = tl.rsqrt(tl.load(var_ptr + o_c, mask=m_c, other=1.0).to(tl.float32) + eps)
        if gamma_ptr is not None:
            b_slope *= tl.load(gamma_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        if beta_ptr is not None:
            b_beta = tl.load(beta_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_mean, b_slope, b_beta


@triton.jit
def normalised(x, b_mean, b_slope, b_beta, mask, ACT: tl.constexpr):
    """ACT((x - mean) * slope + beta) [P, C] in float32; 0 where masked, as padding comes after the activation."""
    b_a = activate((x.to(tl.float32) - b_mean[None, :]) * b_slope[None, :] + b_beta[None, :], ACT)
    return tl.where(mask, b_a, 0.0)


@triton.jit
def activate_backward(grad, x, ACT: tl.constexpr):
    """`grad` times ACT's derivative at x, float32; at a corner as eager has it."""
    if ACT == "relu":
        y = tl.where(x <= 0.0, 0.0, grad)
    elif ACT == "relu6":
        y = tl.where((x <= 0.0) | (x >= 6.0), 0.0, grad)
    elif ACT == "hard_swish":
        y = tl.where(x < -3.0, 0.0, tl.where(x <= 3.0, grad * (x * (1.0 / 3.0) + 0.5), grad))
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        y = grad * s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = grad * (cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACT == "gelu_tanh":
        # y = x * sigmoid(u)
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = 1.0 / (1.0 + tl.exp(-u))
        y = grad * s * (1.0 + x * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        tl.static_assert(ACT == "none", "unknown activation")
        y = grad
    return y


@triton.jit
def through_moments(grad_mean_ptr, grad_var_ptr, z_mean_ptr, count, o_c, m_c):
    """(mean of z, grad_mean / count, 2 * grad_var / count) [C], float32; zeros where nobody uses the moments."""
    b_z_mean = tl.zeros([o_c.shape[0]], tl.float32)
    b_by_mean = tl.zeros([o_c.shape[0]], tl.float32)
    b_by_var = tl.zeros([o_c.shape[0]], tl.float32)
    if z_mean_ptr is not None:
        b_z_mean = tl.load(z_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_by_mean = tl.load(grad_mean_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) / count
        b_by_var = tl.load(grad_var_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) * (2.0 / count)
    return b_z_mean, b_by_mean, b_by_var


@triton.jit
def result_gradient(grad_ptr, z_ptr, o_z, mask, b_by_mean, b_by_var, b_z_mean):
    """The gradient of a convolution's result at the offsets `o_z`: directly and, with `z_ptr`, by its moments."""
    b_grad = tl.load(grad_ptr + o_z, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        b_centred = tl.load(z_ptr + o_z, mask=mask, other=0.0).to(tl.float32) - b_z_mean[None, :]
        b_grad += b_by_mean[None, :] + b_by_var[None, :] * b_centred
    return tl.where(mask, b_grad, 0.0)


def moments_gradient(
    grad_mean: torch.Tensor | None,  # [C]
    grad_var: torch.Tensor | None,  # [C]
    z: torch.Tensor | None,  # [N, C, H, W]
    z_mean: torch.Tensor | None,  # [C]
) -> tuple[torch.Tensor | None, ...]:
    """The four as kernels read them, z in channels_last memory; all None where nothing comes through the moments."""
    if grad_mean is None or grad_var is None or z is None or z_mean is None:
        return (None,) * 4
    return grad_mean, grad_var, nhwc(z), z_mean
