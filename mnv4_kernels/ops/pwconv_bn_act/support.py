"""What can run `pwconv_bn_act`, best first."""

from __future__ import annotations

import torch

from ..support import Backend, library_reasons, tensor_reasons


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
    operands = {"x": x, "weight": weight, "residual": residual}
    vectors = {"scale": scale, "shift": shift, "gamma": gamma, "packed": packed}
    return [*library_reasons("pwconv_bn_act"), *tensor_reasons(operands, vectors)]


BACKENDS = (Backend("cpp", supports),)
