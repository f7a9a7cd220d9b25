"""Schema, fake and dispatch of `bn_act_conv` and its backward."""

from __future__ import annotations

import functools

import torch

from .. import _differentiate
from .._contract import define
from ..conv_bn_act.reference import output_format
from ..layout import empty_like_conv, memory_format_of
from .reference import backward_reference, moments_like, reference


def fake(
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
    moments: bool,
    channels_last: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same shape, dtype and strides as the kernels."""
    kernel = (weight.shape[2], weight.shape[3])
    format_ = output_format(x, channels_last)
    z = empty_like_conv(x, weight.shape[0], kernel, stride, padding, dilation, format_)
    count = weight.shape[0] if moments else 0
    return z, moments_like(x, count), moments_like(x, count)


def backward_fake(
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
    """Same shape, dtype and strides as the kernels."""
    empty = x.new_empty(0)
    inputs: list[torch.Tensor] = [empty] * 5
    if need_input:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
        inputs = [
            dx,
            *(x.new_empty(0) if value is None else torch.empty_like(value) for value in (mean, var, gamma, beta)),
        ]
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else x.new_empty(0)
    return (*inputs, dweight)


bn_act_conv_backward = define(
    "bn_act_conv_backward(Tensor grad, Tensor? grad_mean, Tensor? grad_var, Tensor? z, Tensor? z_mean, Tensor x, "
    "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, Tensor weight, int[] stride, "
    "SymInt[] padding, int[] dilation, bool need_input, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=backward_fake,
    reference=backward_reference,
    differentiable=False,
)

bn_act_conv = define(
    "bn_act_conv(Tensor x, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, Tensor weight, "
    "int[] stride, SymInt[] padding, int[] dilation, bool moments, bool channels_last=False) "
    "-> (Tensor, Tensor, Tensor)",
    fake=fake,
    reference=reference,
    autocast=("x", "weight"),
    backward=bn_act_conv_backward,
    formula=functools.partial(_differentiate.convolution, moments_at=11),
)
