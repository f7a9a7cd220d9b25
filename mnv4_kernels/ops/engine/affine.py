"""What ops take for a convolution, as the engine's nodes take it: checked, and folded in float64."""

from __future__ import annotations

import torch

from .builder import Affine


def folded(
    weight: torch.Tensor,  # [K, ...]
    scale: torch.Tensor | None,  # [K]
    shift: torch.Tensor | None,  # [K]
    gamma: torch.Tensor | None = None,  # [K]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, shift), so that weight * x + shift = (scale * weight * x + shift) * gamma; float64."""
    wide = weight.double()
    offset = None if shift is None else shift.double()
    for factor in (scale, gamma):
        if factor is not None:
            wide = wide * factor.double().view(-1, *[1] * (weight.dim() - 1))
    if offset is not None and gamma is not None:
        offset = offset * gamma.double()
    return wide, offset


def behind(
    weight: torch.Tensor,  # [K, C, 1, 1]
    shift: torch.Tensor | None,  # [K]
    before: Affine,  # [C] each
) -> Affine:
    """(matrix [K, C], shift [K]) of a product that reads scale * x + shift of `before`; float64."""
    matrix = weight.double().flatten(1)
    offset = None if shift is None else shift.double()
    if before[1] is not None:
        moved = matrix @ before[1].double()
        offset = moved if offset is None else offset + moved
    if before[0] is not None:
        matrix = matrix * before[0].double()
    return matrix, offset


def expect(name: str, tensor: torch.Tensor | None, *shape: int | None) -> None:
    """Raises `ValueError` unless the argument `name` is absent or has `shape` on the CPU; None stands for any size."""
    if tensor is None:
        return
    got = tuple(tensor.shape)
    fits = len(got) == len(shape) and all(want in (None, size) for want, size in zip(shape, got, strict=True))
    if not fits or not tensor.is_cpu:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"`{name}` must be [{wanted}] on cpu, got {list(got)} on {tensor.device}")
