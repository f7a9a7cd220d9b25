"""Schema, fake and dispatch of `bn_act` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._contract import define
from .._differentiate import found_or_none, once
from ..layout import memory_format_of
from .reference import backward_reference, reference

#: where the tensors are among the arguments: x, mean, var, gamma, beta, layer_scale
_TENSORS = (0, 1, 2, 3, 4, 7)
_KEEP = 8
_RESIDUAL = 9


def fake(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,
    keep: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    act: str,
    layer_scale: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Same shape, dtype and strides as the kernels."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    vectors = (mean, var, gamma, beta, layer_scale)
    return (dx, *(x.new_empty(0) if value is None else torch.empty_like(value) for value in vectors))


def _formula(backward_op: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(setup_context, backward). Saved: x and [C] vectors; the residual's gradient is the result's."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.eps, ctx.act = inputs[5], inputs[6]
        residual = inputs[_RESIDUAL]
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(*(inputs[index] for index in _TENSORS), inputs[_KEEP])

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, mean, var, gamma, beta, layer_scale, keep = ctx.saved_tensors
        needed = [ctx.needs_input_grad[index] for index in _TENSORS]
        values: list[torch.Tensor | None] = [None] * len(_TENSORS)
        if any(needed):
            with torch.no_grad():
                found = backward_op(grad, x, mean, var, gamma, beta, ctx.eps, ctx.act, layer_scale, keep)
            values = once(found_or_none(found, needed), grad, x, layer_scale)
        result: list[torch.Tensor | None] = [None] * (_RESIDUAL + 1)
        for index, value in zip(_TENSORS, values, strict=True):
            result[index] = value
        if ctx.needs_input_grad[_RESIDUAL]:
            result[_RESIDUAL] = grad.to(ctx.residual_dtype)
        return tuple(result)

    return setup_context, backward


bn_act_backward = define(
    "bn_act_backward(Tensor grad, Tensor x, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
    "str act, Tensor? layer_scale, Tensor? keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=backward_fake,
    reference=backward_reference,
    differentiable=False,
)

bn_act = define(
    "bn_act(Tensor x, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, "
    "Tensor? layer_scale, Tensor? keep, Tensor? residual) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "residual"),
    backward=bn_act_backward,
    formula=_formula,
)
