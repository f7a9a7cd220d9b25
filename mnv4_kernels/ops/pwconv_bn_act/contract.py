"""Schema, fake and dispatch of `pwconv_bn_act`."""

from __future__ import annotations

import torch

from .._contract import define
from ..layout import memory_format_of
from .reference import reference


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    size = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


pwconv_bn_act = define(
    "pwconv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? gamma, Tensor? residual, "
    "Tensor? packed=None) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "weight", "residual"),
)
