"""What a result is compared with: the op's reference, in the dtype under test and in float64."""

from __future__ import annotations

from typing import Any

import torch

from ..ops._contract import REFERENCES
from .layouts import lay_out

Tensors = tuple[torch.Tensor, ...]


def baseline(op: str, arguments: tuple[Any, ...]) -> Tensors:
    """The reference's results in the dtype of `arguments`: what a budget is earned from.

    Eager sums in another order in each memory format; of the two results, each element is
    the one further from the exact one.
    """
    wanted = exact(op, arguments)
    planar, nhwc = (_reference(op, _in_layout(arguments, layout)) for layout in ("contiguous", "channels_last"))
    return tuple(map(_further, planar, nhwc, wanted))


def exact(op: str, arguments: tuple[Any, ...]) -> Tensors:
    """The reference's results in float64, of the very values in `arguments`."""
    return _reference(op, tuple(_double(value) for value in arguments))


def outputs(result: torch.Tensor | Tensors) -> Tensors:
    """The results of an op as a tuple, also where there is only one."""
    return result if isinstance(result, tuple) else (result,)


def _reference(op: str, arguments: tuple[Any, ...]) -> Tensors:
    with torch.no_grad():
        return outputs(REFERENCES[op](*arguments))


def _further(a: torch.Tensor, b: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.where((b.double() - wanted).abs() > (a.double() - wanted).abs(), b, a)


def _in_layout(arguments: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    return tuple(lay_out(value, layout) if isinstance(value, torch.Tensor) else value for value in arguments)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) else value
