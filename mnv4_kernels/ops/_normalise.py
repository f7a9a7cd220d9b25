"""What every training op does to its input, and the derivative of it, in plain torch.

A training op reads the raw result `x` of the convolution before it together with that
convolution's batch normalisation, applies both while it reads, and so the normalised and
activated tensors never exist in memory:

    a = act((x - mean) / sqrt(var + eps) * gamma + beta)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ._accumulate import wide
from .activation import apply

_aten = torch.ops.aten

#: name -> (gradient, input of the activation) -> gradient of the input
_DERIVATIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "none": lambda grad, x: grad,
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0.0, 6.0),
    "hard_swish": lambda grad, x: _aten.hardswish_backward(grad, x),
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x, approximate="none"),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
}


class Normalised(NamedTuple):
    """An input taken apart, in the accumulation dtype."""

    #: x - mean, [N, C, H, W]
    centred: torch.Tensor
    #: 1 / sqrt(var + eps), [1, C, 1, 1]; None without normalisation
    rstd: torch.Tensor | None
    #: rstd * gamma, [1, C, 1, 1]; None without normalisation
    slope: torch.Tensor | None
    #: what the activation is applied to, [N, C, H, W]
    argument: torch.Tensor
    #: the activated input, [N, C, H, W]
    activated: torch.Tensor


class InputGradients(NamedTuple):
    """Gradients of a training op's input and of the normalisation that it applies; [C] but for `x`."""

    x: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor


def channels(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C] -> [1, C, 1, 1] in `like`'s dtype."""
    return value.to(like.dtype).view(1, -1, 1, 1)


def normalise(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
) -> Normalised:
    """act((x - mean) / sqrt(var + eps) * gamma + beta) and its parts; without `mean` act(x)."""
    x = wide(x)
    if mean is None or var is None:
        return Normalised(x, None, None, x, apply(act, x))
    centred = x - channels(mean, x)
    rstd = torch.rsqrt(channels(var, x) + eps)
    slope = rstd if gamma is None else rstd * channels(gamma, x)
    argument = centred * slope
    if beta is not None:
        argument = argument + channels(beta, x)
    return Normalised(centred, rstd, slope, argument, apply(act, argument))


def normalise_backward(
    grad: torch.Tensor,  # [N, C, H, W], of the activated input
    parts: Normalised,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    act: str,
) -> InputGradients:
    """The gradients of `normalise`, rounded to the dtypes of what they belong to; empty tensors for what is absent."""
    grad = _DERIVATIVES[act](grad, parts.argument)
    empty = x.new_empty(0)
    if mean is None or var is None or parts.rstd is None or parts.slope is None:
        return InputGradients(grad.to(x.dtype), empty, empty, empty, empty)
    total = grad.sum((0, 2, 3))
    spread = (grad * parts.centred).sum((0, 2, 3))
    rstd, slope = parts.rstd.flatten(), parts.slope.flatten()
    return InputGradients(
        (grad * parts.slope).to(x.dtype),
        (-slope * total).to(mean.dtype),
        (-0.5 * slope * rstd * rstd * spread).to(var.dtype),
        empty if gamma is None else (rstd * spread).to(gamma.dtype),
        empty if beta is None else total.to(beta.dtype),
    )
