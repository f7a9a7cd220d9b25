"""Torch-only definition of `bn_act` and its backward."""

from __future__ import annotations

import torch

from .._normalise import channels, normalise, normalise_backward
from ..layout import memory_format_of


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,  # [C]
    keep: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [N, C, H, W]
) -> torch.Tensor:
    """y = act(bn(x)) * layer_scale * keep + residual, in float32, rounded once to x's dtype.

    `keep` is stochastic depth's factor of each image: 0, or 1 over the probability of not being 0.
    """
    y = normalise(x, mean, var, gamma, beta, eps, act).activated * factor(x, layer_scale, keep)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def backward_reference(
    grad: torch.Tensor,  # [N, C, H, W]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,  # [C]
    keep: torch.Tensor | None,  # [N]
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, mean, var, gamma, beta and layer_scale; empty tensors for what is absent."""
    parts = normalise(x, mean, var, gamma, beta, eps, act)
    grad = grad.to(parts.activated.dtype)
    inputs = normalise_backward(grad * factor(x, layer_scale, keep), parts, x, mean, var, gamma, beta, act)
    inputs = inputs._replace(x=inputs.x.contiguous(memory_format=memory_format_of(x)))
    if layer_scale is None:
        return (*inputs, x.new_empty(0))
    scaled = grad * parts.activated * factor(x, None, keep)
    return (*inputs, scaled.sum((0, 2, 3)).to(layer_scale.dtype))


def factor(x: torch.Tensor, layer_scale: torch.Tensor | None, keep: torch.Tensor | None) -> torch.Tensor | float:
    """layer_scale * keep, broadcast over `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    found: torch.Tensor | float = 1.0
    if layer_scale is not None:
        found = channels(layer_scale, x.new_empty(0, dtype=dtype))
    return found if keep is None else found * keep.to(dtype).view(-1, 1, 1, 1)
