"""How an op becomes a torch op: one schema, one fake, one reference, one autocast rule.

Contracts import no kernel. The reference is registered for every backend
(`CompositeExplicitAutograd`), so that an op always answers; the C++ library, when it
is there, implements the same schemas for the CPU key and takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from ..backends.torch_internals import (
    KEYS_BELOW_AUTOGRAD,
    DispatchKey,
    DispatchKeySet,
    any_requires_grad,
    below_autograd,
    without_key,
)

NAMESPACE = "mnv4_kernels"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: op name -> the op as an autograd function called from Python, without the dispatcher's stops on its way: 40 us less
#: a call. Not under autocast.
DIRECT: dict[str, Callable[..., Any]] = {}

#: backward op -> (setup_context, backward) of `torch.library.register_autograd`
Formula = Callable[[Callable[..., Any]], tuple[Callable[..., Any], Callable[..., Any]]]

#: op name -> how its backward op is called
FORMULAS: dict[str, Formula] = {}

#: op name -> the torch-only function that defines its result
REFERENCES: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    autocast: Iterable[str] = (),
    differentiable: bool = True,
    backward: Any = None,
    formula: Formula | None = None,
) -> Any:
    """Registers one op and returns its `OpOverload`.

    Args:
        schema: the op's schema without namespace, e.g. ``"relu(Tensor x) -> Tensor"``.
        fake: shape, dtype and strides of the result; same signature as the op.
        reference: torch-only implementation; same signature as the op.
        autocast: names of the tensor arguments that autocast casts to its dtype; the
            others (per-channel scales and shifts, packed weights) stay float32.
        differentiable: derive a backward from the reference by recomputing it.
        backward: the op's own backward op, and
        formula: how it is called.
    """
    name = schema.split("(", 1)[0]
    # an op takes x as it lies and answers in x's format: inductor need not copy its inputs to the strides of eager
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    REFERENCES[name] = reference
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    arguments = [argument.name for argument in op._schema.arguments]
    cast = [arguments.index(argument) for argument in autocast]
    for device in ("CPU", "CUDA"):
        _register_autocast(name, op, cast, device)
    if formula is not None:
        FORMULAS[name] = formula
        DIRECT[name] = differentiable_by(op, backward, formula)
        _register_autograd(name, op, DIRECT[name])
    elif differentiable:
        _register_autograd(name, op, differentiable_by(op, reference, _recomputing))
    return op


def differentiable_by(op: Callable[..., Any], backward: Callable[..., Any], formula: Formula) -> Callable[..., Any]:
    """`op` as a function with gradients, computed by `backward`: two ops, or the two references of one."""
    setup_context, vjp = formula(backward)

    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(vjp)}
    function: Any = type(op.__name__, (torch.autograd.Function,), members)
    return cast(Callable[..., Any], function.apply)


def _register_autograd(name: str, op: Any, differentiable: Callable[..., Any]) -> None:
    """`differentiable` where a gradient is wanted, else straight on; sooner than `register_autograd` does."""

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return differentiable(*args)
        return op.redispatch(keys & KEYS_BELOW_AUTOGRAD, *args)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def _register_autocast(name: str, op: Any, cast: list[int], device: str) -> None:
    key = DispatchKeySet(getattr(DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        values = list(args)
        for index in cast:
            if index < len(values):
                values[index] = _cast(values[index], dtype, device_type)
        with without_key(key):
            return op(*values)

    LIBRARY.impl(name, autocast, f"Autocast{device}")


def _cast(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    eligible = value.is_floating_point() and value.device.type == device_type
    return value.to(dtype) if eligible and value.dtype != torch.float64 else value


def _recomputing(reference: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Backward = the vector-Jacobian product of the reference, recomputed from the inputs."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.is_tensor = is_tensor
        ctx.others = [None if tensor else value for value, tensor in zip(inputs, is_tensor, strict=True)]
        ctx.save_for_backward(*(value for value, tensor in zip(inputs, is_tensor, strict=True) if tensor))

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        needed = [
            index
            for index, value in enumerate(values)
            if isinstance(value, torch.Tensor) and ctx.needs_input_grad[index]
        ]
        with torch.enable_grad():
            for index in needed:
                values[index] = values[index].detach().requires_grad_()
            outputs = reference(*values)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (output, grad)
                for output, grad in zip(outputs, grads, strict=True)
                if grad is not None and output.requires_grad
            ]
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [values[index] for index in needed],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        result: list[torch.Tensor | None] = [None] * len(values)
        for index, grad in zip(needed, found, strict=True):
            result[index] = grad
        return tuple(result)

    return setup_context, backward
