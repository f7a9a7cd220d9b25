"""One kernel, registered in every way that there is: the same schema, the same result, allocated and not written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAMESPACE = "mnv4_call_forms"
ARGUMENTS = "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? gamma, Tensor? residual)"
SCHEMA = f"{ARGUMENTS} -> Tensor"

Call = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


def kernel(x: Any, weight: Any, scale: Any, shift: Any, act: Any, gamma: Any, residual: Any) -> torch.Tensor:
    """Allocates, and that is all."""
    return torch.empty_like(x)


class Recorded(torch.autograd.Function):
    """An autograd function around an op, as modules call training ops."""

    @staticmethod
    def forward(ctx: Any, op: Any, *arguments: Any) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: torch.Tensor = op(*arguments)
        setup(ctx, arguments, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (None, *vjp(ctx, grad))


def setup(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves what a backward would need."""
    ctx.save_for_backward(*inputs[:4])


def vjp(ctx: Any, grad: torch.Tensor) -> Any:
    """Any gradient."""
    return (grad, *[None] * 6)


def python_forms() -> dict[str, Any]:
    """Name -> what is called."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in ("defined", "defined_autograd"):
        library.define(name + SCHEMA)
        library.impl(name, kernel, "CPU")
    torch.library.register_autograd(f"{NAMESPACE}::defined_autograd", vjp, setup_context=setup, lib=library)
    custom = [
        torch.library.custom_op(f"{NAMESPACE}::{name}", kernel, mutates_args=(), schema=SCHEMA)
        for name in ("custom", "custom_autograd")
    ]
    custom[1].register_autograd(vjp, setup_context=setup)
    ops = getattr(torch.ops, NAMESPACE)
    python_forms.library = library  # type: ignore[attr-defined]
    return {
        "Python: function": kernel,
        "Python: define, impl": ops.defined.default,
        "Python: define, impl, register_autograd": ops.defined_autograd.default,
        "Python: define, impl in an autograd.Function": functools.partial(Recorded.apply, ops.defined.default),
        "Python: custom_op": custom[0],
        "Python: custom_op, register_autograd": custom[1],
    }


def cpp_forms() -> dict[str, Any]:
    """The same in C++; compiles `call_forms.cpp`."""
    module: Any = cpp_extension.load(NAMESPACE, [str(Path(__file__).with_suffix(".cpp"))], verbose=False)
    ops = getattr(torch.ops, NAMESPACE)
    torch.library.register_autograd(f"{NAMESPACE}::stable_autograd", vjp, setup_context=setup)
    return {
        "C++: function (pybind11)": module.kernel,
        "C++: TORCH_LIBRARY": ops.unstable.default,
        "C++: stable ABI": ops.stable.default,
        "C++: stable ABI, register_autograd": ops.stable_autograd.default,
        "C++: stable ABI in an autograd.Function": functools.partial(Recorded.apply, ops.stable.default),
    }


def forms(channels: int) -> dict[tuple[str, str], Call]:
    """Every (form, column)."""
    x = torch.randn(1, channels, 1, 1)
    rest = (torch.randn(channels, channels, 1, 1), torch.randn(channels), torch.randn(channels), "relu", None, None)
    relu = torch.ops.aten.relu.default
    found: dict[tuple[str, str], Call] = {}
    for name, call in {"aten::relu": lambda *values: relu(values[0]), **python_forms(), **cpp_forms()}.items():
        found[name, "no_grad"] = (functools.partial(call, x, *rest), torch.no_grad)
        found[name, "gradients"] = (functools.partial(call, x.clone().requires_grad_(), *rest), nullcontext)
    found["aten::relu", "no_grad"] = (functools.partial(relu, x), torch.no_grad)
    found["aten::relu", "gradients"] = (functools.partial(relu, x.clone().requires_grad_()), nullcontext)
    return found
