"""The autograd formulas of the training ops: one forward op, one backward op, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends.torch_internals import DelayedError

#: arguments of every convolution that trains: x, mean, var, gamma, beta, eps, act, weight
_TENSORS = (0, 1, 2, 3, 4, 7)
_WEIGHT = 7
_INPUTS = (0, 1, 2, 3, 4)

TWICE = "mnv4_kernels' training ops can't be differentiated twice; call `mnv4_kernels.unpatch(model)` first"


def found_or_none(values: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor | None]:
    """What a backward op computed, None for what nobody needs or what has no gradient."""
    return [value if need and value.numel() else None for value, need in zip(values, needed, strict=True)]


def once(values: Sequence[torch.Tensor | None], *sources: torch.Tensor | None) -> list[torch.Tensor | None]:
    """`values`; an error for whoever differentiates them, where a graph of the backward was asked for."""
    recording = torch.is_grad_enabled() and any(source is not None and source.requires_grad for source in sources)
    if not recording:
        return list(values)
    present = [value.detach().requires_grad_() for value in values if value is not None]
    error = DelayedError(TWICE, len(present))
    found = error(*present)
    marked = iter(found if isinstance(found, tuple) else (found,))
    return [None if value is None else next(marked) for value in values]


def convolution(backward_op: Any, moments_at: int) -> tuple[Any, Any]:
    """(setup_context, backward) of a convolution over a normalised input.

    Saved: the raw input x, weight and [C] vectors; of the result only where its moments are
    used, and it is the next op's input x anyway. Nothing normalised or activated is kept.

    Args:
        backward_op: called with the gradients, the saved tensors, the geometry and what is needed.
        moments_at: where `moments` is among the arguments; the geometry lies between weight and it.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.moments = inputs[moments_at]
        ctx.eps, ctx.act = inputs[5], inputs[6]
        ctx.geometry = inputs[_WEIGHT + 1 : moments_at]
        ctx.arguments = len(inputs)
        result = output[:2] if ctx.moments else (None, None)
        ctx.save_for_backward(*(inputs[index] for index in _TENSORS), *result)

    def backward(ctx: Any, grad: torch.Tensor, grad_mean: torch.Tensor, grad_var: torch.Tensor) -> tuple[Any, ...]:
        x, mean, var, gamma, beta, weight, z, z_mean = ctx.saved_tensors
        need_input = any(ctx.needs_input_grad[index] for index in _INPUTS)
        through = (grad_mean, grad_var, z, z_mean) if ctx.moments else (None,) * 4
        with torch.no_grad():
            found = backward_op(
                grad, *through, x, mean, var, gamma, beta, ctx.eps, ctx.act, weight, *ctx.geometry, need_input,
                ctx.needs_input_grad[_WEIGHT],
            )  # fmt: skip
        values = found_or_none(found, [ctx.needs_input_grad[index] for index in _TENSORS])
        values = once(values, grad, grad_mean, grad_var, x, weight)
        result: list[torch.Tensor | None] = [None] * ctx.arguments
        for index, value in zip(_TENSORS, values, strict=True):
            result[index] = value
        return tuple(result)

    return setup_context, backward
