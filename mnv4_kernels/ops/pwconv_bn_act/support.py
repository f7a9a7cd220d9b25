"""What can run `pwconv_bn_act`, best first."""

from __future__ import annotations

import torch

from ..support import Backend, library_reasons, tensor_reasons, triton


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None = None,
) -> list[str]:
    """Why the C++ kernel can't run this call; empty list: it can."""
    tensors = tensor_reasons(
        x=x, weight=weight, scale=scale, shift=shift, gamma=gamma, residual=residual, packed=packed
    )
    return [*library_reasons("pwconv_bn_act"), *tensors]


BACKENDS = (Backend("cpp", supports), triton("pwconv_bn_act"))
