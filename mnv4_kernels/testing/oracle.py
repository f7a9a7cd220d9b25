"""What a result is compared with: the op's reference, in the dtype under test and in float64."""

from __future__ import annotations

from typing import Any

import torch

from ..ops._contract import REFERENCES


def reference(op: str, arguments: tuple[Any, ...]) -> Any:
    """The torch-only reference's result, in the dtype of `arguments`: the baseline of a budget."""
    with torch.no_grad():
        return REFERENCES[op](*arguments)


def exact(op: str, arguments: tuple[Any, ...]) -> Any:
    """The reference's result in float64, of the very values in `arguments`."""
    return reference(op, tuple(_double(value) for value in arguments))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) else value
