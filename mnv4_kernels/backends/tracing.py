"""What `torch.compile` may take for granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Marks `function` as one whose answer a compiled graph reads once, when it is made, and keeps."""
    # what torch.compiler.assume_constant_result does, which would import all of torch._dynamo, and Triton with it
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
