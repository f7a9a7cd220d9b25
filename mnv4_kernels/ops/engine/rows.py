"""The rows of a program: one node each, as the integers that the engine reads."""

from __future__ import annotations

import functools

from ...backends import native
from ...backends.torch_internals import constant_in_graphs
from ..activation import ACTIVATIONS


@constant_in_graphs
def fields() -> tuple[str, ...]:
    """The columns of a program's rows, as the C++ side has them."""
    return _names("engine_fields")


def row(kind: str, source: int, weight: int, **values: int) -> list[int]:
    """The node `kind` on the result of node `source`; its arrays begin at number `weight`."""
    known = {"kind": _code("engine_kinds", kind), "input": source, "residual": -1, "weight": weight}
    everything = {**known, "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1, **values}
    return [everything.get(field, 0) for field in fields()]


def pad_mode(name: str) -> int:
    """The number of a way to pad: explicit, same or reflect."""
    return _code("engine_pad_modes", name)


def act_code(name: str) -> int:
    """The number of an activation."""
    return list(ACTIVATIONS).index(name)


@constant_in_graphs
def _code(table: str, name: str) -> int:
    return _names(table).index(name)


@functools.cache
def _names(table: str) -> tuple[str, ...]:
    return tuple(getattr(native.module(), table)())
