"""What tests of single kernels share: the lists, memory between guards, packed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnv4_kernels.backends import native
from mnv4_kernels.testing import tiers

if not native.available():
    pytest.skip("the microkernels are C++", allow_module_level=True)

kernels: Any = native.module().microkernels
LISTS: dict[str, list[dict[str, Any]]] = kernels.lists()
PANEL: int = native.module().panel_width()
GUARD = 64
EPS = torch.finfo(torch.float32).eps


def rows_of(family: str) -> list[Any]:
    """The rows of a list as test parameters; those of absent tiers are skipped by name."""
    return [
        pytest.param(
            row,
            id=row["listed_name"],
            marks=pytest.mark.skipif(row["tier"] not in tiers(), reason=f"this processor has no {row['tier']}"),
        )
        for row in LISTS[family]
    ]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values that `dtype` holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a kernel's storage."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Guarded:
    """`size` elements between guards, shared with C++ as a buffer.

    Attributes:
        values: the elements, NaN at first.
        buffer: what a kernel gets; its first byte is values[0].
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        memory = bytearray((size + 2 * GUARD) * dtype.itemsize)
        self._all = torch.frombuffer(memory, dtype=dtype)
        self._all.fill_(float("nan"))
        self.values = self._all[GUARD : GUARD + size]
        self.buffer = memoryview(memory)[GUARD * dtype.itemsize :]

    @classmethod
    def of(cls, values: torch.Tensor) -> Guarded:
        """Holding `values`."""
        made = cls(values.numel(), values.dtype)
        made.values.copy_(values.flatten())
        return made

    def written(self) -> torch.Tensor:
        """Which of the elements hold something; fails if a guard does."""
        filled = ~self._all.isnan()
        assert not bool(filled[:GUARD].any() | filled[-GUARD:].any()), "wrote outside its memory"
        return filled[GUARD:-GUARD]


def pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[K, N] -> panels [N / 16][K][16], in bfloat16 [N / 16][K / 2][16][2]."""
    k, n = weight.shape
    panels = weight.reshape(k, n // PANEL, PANEL).transpose(0, 1)
    if dtype == torch.bfloat16:
        panels = panels.reshape(-1, k // 2, 2, PANEL).transpose(2, 3)
    return panels.contiguous()
