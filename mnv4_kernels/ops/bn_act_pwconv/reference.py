"""Torch-only definition of `bn_act_pwconv` and its backward."""

from __future__ import annotations

import torch

from ..bn_act_conv.reference import Moments
from ..bn_act_conv.reference import backward_reference as dense_backward
from ..bn_act_conv.reference import reference as dense

#: stride, padding and dilation of a product
GEOMETRY: tuple[list[int], list[int], list[int]] = ([1, 1], [0, 0, 0, 0], [1, 1])


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    moments: bool,
) -> Moments:
    """(z, its mean, its biased variance): z = conv1x1(act(bn(x)), weight) in float32, rounded once to x's dtype."""
    return dense(x, mean, var, gamma, beta, eps, act, weight, *GEOMETRY, moments)


def backward_reference(
    grad: torch.Tensor,  # [N, K, H, W]
    grad_mean: torch.Tensor | None,  # [K]
    grad_var: torch.Tensor | None,  # [K]
    z: torch.Tensor | None,  # [N, K, H, W]
    z_mean: torch.Tensor | None,  # [K]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    need_input: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, mean, var, gamma, beta and weight; empty tensors for what is absent or not needed."""
    return dense_backward(
        grad, grad_mean, grad_var, z, z_mean, x, mean, var, gamma, beta, eps, act, weight, *GEOMETRY,
        need_input, need_weight,
    )  # fmt: skip
