"""What can run `mqa`, best first."""

from __future__ import annotations

import torch

from ..support import Backend, library_reasons, tensor_reasons, triton


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
) -> list[str]:
    """Why the C++ kernel can't run this call; empty list: it can."""
    tensors = tensor_reasons(query=query, key=key, value=value)
    return [*library_reasons("mqa"), *tensors]


BACKENDS = (Backend("cpp", supports), triton("mqa"))
