"""BatchNorm as scale and shift, and both folded into weights: in float64, rounded once to float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..backends import native
from ..ops.gpu.launch import store_tap_major
from . import leaves


def affine_of(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One of `leaves.NORMS` in eval mode as float64 (scale [C], shift [C]): y = x * scale + shift."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def epilogue_of(
    conv: nn.Conv2d, norm: nn.Module | None, gamma: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What follows `conv` as float64 (scale [K] or None, shift [K] or None): bias, `norm`, layer scale `gamma` [K]."""
    scale = shift = None
    if norm is not None:
        scale, shift = affine_of(norm)
    if conv.bias is not None:
        bias = conv.bias.double()
        shift = bias if scale is None or shift is None else bias * scale + shift
    if gamma is not None:
        factor = gamma.double()
        scale = factor if scale is None else scale * factor
        shift = None if shift is None else shift * factor
    return scale, shift


class Operands(NamedTuple):
    """What an op is given for a convolution."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    packed: torch.Tensor | None


def operands(
    weight: torch.Tensor,  # [K, ...], float64
    scale: torch.Tensor | None,  # [K], float64
    shift: torch.Tensor | None,  # [K], float64
    dtype: torch.dtype,
    op: str,
) -> Operands:
    """Folded and packed arguments of `op` for activations in `dtype`.

    In float32 the scale goes into the weight. In low precision that would round the
    weight anew, so it stays outside; the packed form is float32 and has it inside. On a GPU
    nothing is packed, but the weight lies as the kernels read it.
    """
    packed = pack(weight, scale, op == "dwconv_bn_act")
    float_shift = None if shift is None else shift.float()
    if dtype == torch.float32:
        return Operands(laid_out(scaled(weight, scale).float()), None, float_shift, packed)
    float_scale = None if scale is None or packed is not None else scale.float()
    return Operands(laid_out(weight.to(dtype)), float_scale, float_shift, packed)


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [K, C, kh, kw] dense; on a GPU with its channels adjacent, so that no call of a kernel copies it."""
    if not leaves.on_gpu(weight):
        return weight.contiguous()
    if weight.shape[1] == 1 and weight.shape[2:].numel() > 1:
        return store_tap_major(weight)
    return weight.contiguous(memory_format=torch.channels_last)


def pack(weight: torch.Tensor, scale: torch.Tensor | None, depthwise: bool) -> torch.Tensor | None:
    """weight * scale in the order of the C++ microkernels; None on a GPU and where the library is not loaded."""
    if leaves.on_gpu(weight) or not native.available():
        return None
    return ops.prepack(scaled(weight, scale).float().contiguous(), depthwise)


def scaled(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`weight` [K, ...] with each output channel multiplied by its `scale` [K]; None is 1."""
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.dim() - 1))
