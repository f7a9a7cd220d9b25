"""What ops take for a convolution, as the engine's nodes take it: checked, and folded in float64."""

from __future__ import annotations

import torch

from .builder import Affine, Product
from .weights import Weight


def folded(
    weight: torch.Tensor,  # [K, ...]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    gamma: torch.Tensor | None = None,  # [K]
) -> Product:
    """(weight, shift), so that weight * x + shift = (scale * weight * x + shift) * gamma; float64."""
    offset = None if shift is None else shift.double()
    if offset is not None and gamma is not None:
        offset = offset * gamma.double()
    return Weight(weight).scaled(scale).scaled(gamma), offset


def behind(
    weight: Weight,  # [K, C]
    shift: torch.Tensor | None,  # [K]
    before: Affine,  # [C] each
) -> Product:
    """(weight [K, C], shift [K]) of a product that reads scale * x + shift of `before`; float64."""
    scale, moved = before
    offset = None if shift is None else shift.double()
    if moved is not None:
        constant = weight.wide() @ moved.double()
        offset = constant if offset is None else offset + constant
    return weight.behind(scale), offset


def expect(name: str, tensor: torch.Tensor | None, *shape: int | None) -> None:
    """Raises `ValueError` unless the argument `name` is absent or has `shape` on the CPU; None stands for any size."""
    if tensor is None:
        return
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(want in (None, size) for want, size in zip(shape, got, strict=True))
    if not fits or not tensor.is_cpu:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` must be [{wanted}] on cpu, got {list(got)} on {tensor.device}")
