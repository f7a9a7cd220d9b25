"""What can run `uib`, best first."""

from __future__ import annotations

from typing import Any

import torch

from ..support import Backend, library_reasons, tensor_reasons, triton
from .contract import uib

# read here, since Dynamo of older torch can't iterate over a schema's arguments
_NAMES = tuple(argument.name for argument in uib._schema.arguments)


def supports(*arguments: Any) -> list[str]:
    """Why the engine can't run this call; empty list: it can."""
    named = zip(_NAMES, arguments, strict=False)
    tensors = {name: value for name, value in named if isinstance(value, torch.Tensor)}
    return [*library_reasons("uib"), *tensor_reasons(**tensors)]


BACKENDS = (Backend("cpp", supports), triton("uib"))
