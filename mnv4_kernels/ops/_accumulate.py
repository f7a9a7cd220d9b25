"""What every reference does with low precision: widen, compute, round once."""

from __future__ import annotations

import torch

from .activation import apply


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that is accumulated in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def optional_like(value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """`value` in `x`'s dtype, None kept."""
    return None if value is None else value.to(x.dtype)


def affine_act(
    y: torch.Tensor,  # [N, C, H, W], accumulation dtype
    scale: torch.Tensor | None,  # [C]
    shift: torch.Tensor | None,  # [C]
    act: str,
) -> torch.Tensor:
    """act(y * scale + shift), per channel."""
    if scale is not None:
        y = y * scale.to(y.dtype).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(y.dtype).view(1, -1, 1, 1)
    return apply(act, y)
