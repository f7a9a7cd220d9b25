"""Schema, fake and dispatch of `bn_act_pwconv` and its backward."""

from __future__ import annotations

import functools

import torch

from .. import _differentiate
from .._contract import define
from ..bn_act_conv.contract import backward_fake as dense_backward_fake
from ..bn_act_conv.contract import fake as dense_fake
from .reference import GEOMETRY, backward_reference, reference


def fake(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    act: str,
    weight: torch.Tensor,
    moments: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same shape, dtype and strides as the kernels."""
    return dense_fake(x, mean, var, gamma, beta, eps, act, weight, *GEOMETRY, moments)


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
    need_input: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, ...]:
    """Same shape, dtype and strides as the kernels."""
    return dense_backward_fake(
        grad, grad_mean, grad_var, z, z_mean, x, mean, var, gamma, beta, eps, act, weight, *GEOMETRY, need_input,
        need_weight,
    )  # fmt: skip


bn_act_pwconv_backward = define(
    "bn_act_pwconv_backward(Tensor grad, Tensor? grad_mean, Tensor? grad_var, Tensor? z, Tensor? z_mean, Tensor x, "
    "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, Tensor weight, bool need_input, "
    "bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=backward_fake,
    reference=backward_reference,
    differentiable=False,
)

bn_act_pwconv = define(
    "bn_act_pwconv(Tensor x, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, "
    "Tensor weight, bool moments) -> (Tensor, Tensor, Tensor)",
    fake=fake,
    reference=reference,
    autocast=("x", "weight"),
    backward=bn_act_pwconv_backward,
    formula=functools.partial(_differentiate.convolution, moments_at=8),
)
