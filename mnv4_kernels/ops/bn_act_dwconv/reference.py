"""Torch-only definition of `bn_act_dwconv` and its backward."""

from __future__ import annotations

import torch

from ..bn_act_conv.reference import Moments
from ..bn_act_conv.reference import backward_reference as dense_backward
from ..bn_act_conv.reference import reference as dense


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [C, 1, kh, kw]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    moments: bool,
) -> Moments:
    """(z, its mean, its biased variance): z = dwconv(act(bn(x)), weight) in float32, rounded once to x's dtype."""
    normalisation = (mean, var, gamma, beta, eps, act)
    return dense(x, *normalisation, weight, stride, padding, dilation, moments, False, x.shape[1])


def backward_reference(
    grad: torch.Tensor,  # [N, C, Ho, Wo]
    grad_mean: torch.Tensor | None,  # [C]
    grad_var: torch.Tensor | None,  # [C]
    z: torch.Tensor | None,  # [N, C, Ho, Wo]
    z_mean: torch.Tensor | None,  # [C]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [C, 1, kh, kw]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, mean, var, gamma, beta and weight; empty tensors for what is absent or not needed."""
    return dense_backward(
        grad, grad_mean, grad_var, z, z_mean, x, mean, var, gamma, beta, eps, act, weight, stride, padding,
        dilation, need_input, need_weight, x.shape[1],
    )  # fmt: skip
