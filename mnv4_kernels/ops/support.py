"""Which backend answers a call, and why a better one does not.

Each op has one ordered list of backends (`BACKENDS` in its `support.py`). A backend's
`reasons` takes the op's own arguments and says in words why it can't run them; no reason
means that it can. The same answer drives dispatch in `functional`, `explain`, error texts
and test skips. The torch-only reference stands behind every list and takes anything.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import environment
from ..backends import cuda, native
from ..backends.torch_internals import OpOverload, constant_in_graphs

#: What the C++ kernels read and write; they accumulate in float32.
CPP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


class Backend(NamedTuple):
    """One row of an op's list."""

    name: str
    #: takes the op's arguments; empty list: this backend can run them
    reasons: Callable[..., list[str]]


def backends_of(op: str) -> tuple[Backend, ...]:
    """The list of the op called `op`."""
    found: tuple[Backend, ...] = importlib.import_module(f"{__package__}.{op}.support").BACKENDS
    return found


_SWITCHES = {op: environment.Switches([op]) for op in (*environment.OPS, *environment.TRAINING_OPS)}


@constant_in_graphs
def switch_reasons(op: str) -> list[str]:
    """Which switch turns `op` off; read once per graph under `torch.compile`, as are all reasons of the process."""
    switched_off = _SWITCHES[op].obstacle()
    return [switched_off] if switched_off else []


@constant_in_graphs
def library_reasons(op: str) -> list[str]:
    """Why the C++ library doesn't serve `op` in this process."""
    return [*switch_reasons(op), *native.reasons()]


def cpp(op: OpOverload) -> Backend:
    """The row of `op`'s C++ kernel."""
    # read here, since Dynamo of older torch can't iterate over a schema's arguments
    names = tuple(argument.name for argument in op._schema.arguments)
    return Backend("cpp", functools.partial(cpp_reasons, op._opname, names))


def cpp_reasons(op: str, names: tuple[str, ...], *arguments: Any) -> list[str]:
    """Why the C++ kernel of `op`, whose arguments are called `names`, can't run this call; empty list: it can."""
    named = zip(names, arguments, strict=False)
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    return [*library_reasons(op), *tensor_reasons(**tensors)]


def triton(op: str) -> Backend:
    """The row of `op`'s Triton kernel."""
    return Backend("triton", functools.partial(triton_reasons, op))


def triton_reasons(op: str, *arguments: Any) -> list[str]:
    """Why the Triton kernel of `op` can't run this call; empty list: it can."""
    return [*switch_reasons(op), *cuda.reasons_for(op, *arguments)]


def tensor_reasons(**tensors: torch.Tensor) -> list[str]:
    """What the C++ kernels don't take among an op's tensors, by name."""
    reasons = []
    for name, value in tensors.items():
        if not value.is_cpu:
            reasons.append(f"`{name}` is on {value.device}; the C++ kernels run on cpu")
        if value.dtype not in CPP_DTYPES:
            reasons.append(f"`{name}` is {dtype_name(value.dtype)}; the C++ kernels take float32, bfloat16 and float16")
    return reasons


def dtype_name(dtype: torch.dtype | None) -> str:
    """`dtype` as people write it: float32, not torch.float32."""
    return str(dtype).removeprefix("torch.")
