"""What can run `head`, best first."""

from __future__ import annotations

import torch

from ..support import Backend, library_reasons, tensor_reasons, triton


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    classifier_weight: torch.Tensor | None,
    classifier_bias: torch.Tensor | None,
    packed: torch.Tensor | None = None,
    classifier_packed: torch.Tensor | None = None,
) -> list[str]:
    """Why the C++ kernel can't run this call; empty list: it can."""
    tensors = tensor_reasons(
        x=x,
        weight=weight,
        scale=scale,
        shift=shift,
        classifier_weight=classifier_weight,
        classifier_bias=classifier_bias,
        packed=packed,
        classifier_packed=classifier_packed,
    )
    return [*library_reasons("head"), *tensors]


BACKENDS = (Backend("cpp", supports), triton("head"))
