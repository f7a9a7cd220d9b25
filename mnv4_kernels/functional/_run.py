"""From a checked call to what answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._arguments import under_autocast
from ..backends.torch_internals import forward_mode
from ..ops.support import Backend


def run(
    op: Any,
    backends: Sequence[Backend],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    operands: tuple[int, ...],
) -> Any:
    """`arguments` through the op where a backend can take them, else through the reference.

    `operands` are the positions of what autocast casts.
    """
    if not forward_mode():
        for backend in backends:
            if not backend.reasons(*arguments):
                return op(*arguments)
    first = arguments[0]
    if not under_autocast(first):
        return reference(*arguments)
    # the op's own autocast rule is passed by on this road
    device_type = first.device.type
    dtype = torch.get_autocast_dtype(device_type)
    values = list(arguments)
    for index in operands:
        value = values[index]
        if value is not None and value.dtype != torch.float64:
            values[index] = value.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return reference(*values)
