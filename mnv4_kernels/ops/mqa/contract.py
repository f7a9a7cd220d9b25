"""Schema, fake and dispatch of `mqa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._contract import define
from .._differentiate import once
from ..layout import memory_format_of
from .reference import backward_reference, reference


def fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (query.shape[0], heads * value.shape[2], query.shape[2], query.shape[3])
    return torch.empty(size, dtype=query.dtype, device=query.device, memory_format=memory_format_of(query))


def backward_fake(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same shape, dtype and strides as the kernels."""
    format_ = memory_format_of(query)
    dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device, memory_format=format_)
    return dquery, key.new_empty(key.shape), value.new_empty(value.shape)


def _formula(backward_op: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(setup_context, backward). Saved: the inputs."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.heads, ctx.scale = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        with torch.no_grad():
            found = backward_op(grad, *inputs, ctx.heads, ctx.scale)
        needed = ctx.needs_input_grad[:3]
        values = [value if need else None for value, need in zip(found, needed, strict=True)]
        return (*once(values, grad, *inputs), None, None)

    return setup_context, backward


mqa_backward = define(
    "mqa_backward(Tensor grad, Tensor query, Tensor key, Tensor value, int heads, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    fake=backward_fake,
    reference=backward_reference,
    differentiable=False,
)

mqa = define(
    "mqa(Tensor query, Tensor key, Tensor value, int heads, float scale) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("query", "key", "value"),
    backward=mqa_backward,
    formula=_formula,
)
