"""The same values in memory in the ways in which users hand them over."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 4:
        return _contiguous(x)
    return x.clone(memory_format=torch.contiguous_format).contiguous(memory_format=torch.channels_last)


def _permuted(x: torch.Tensor) -> torch.Tensor:
    """Dense, dimensions stored in reverse: neither contiguous nor channels_last."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """A window of a larger tensor: gaps between rows, a storage offset."""
    larger = x.new_full([size + 3 for size in x.shape], float("nan"))
    window = larger[tuple(slice(1, 1 + size) for size in x.shape)]
    return window.copy_(x)


def _sliced_channels_last(x: torch.Tensor) -> torch.Tensor:
    """A window of a larger NHWC tensor: channels adjacent, pixels further apart than they are wide."""
    if x.dim() != 4:
        return _sliced(x)
    n, c, h, w = x.shape
    larger = x.new_full((n + 1, h + 2, w + 2, c + 5), float("nan")).permute(0, 3, 1, 2)
    return larger[1:, 2 : 2 + c, 1 : 1 + h, 1 : 1 + w].copy_(x)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Every second element of the last dimension: no dimension has stride 1."""
    larger = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    return larger[..., ::2].copy_(x)


def _offset(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, beginning one element into its storage: not aligned to a vector."""
    flat = x.new_full((x.numel() + 1,), float("nan"))
    return flat[1:].view(x.shape).copy_(x)


def _expanded(x: torch.Tensor) -> torch.Tensor:
    """The first slice of dimension 0, repeated with stride 0."""
    return x[:1].clone(memory_format=torch.contiguous_format).expand(x.shape)


#: Name -> function that lays a tensor out anew. Values stay, but for "expanded", which repeats the first of the batch.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "permuted": _permuted,
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
}


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of `x` in `layout`, one of `LAYOUTS`; what lies between its elements is NaN."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return LAYOUTS[layout](x.detach())
