"""Weights that are folded when they are packed: all of a program at once would take as much memory as its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

#: One of a program's arrays, or what makes it when it is packed.
Array = torch.Tensor | Callable[[], torch.Tensor]

#: How many values are float64 at a time: as many as torch computes without waiting for another thread, and L2 holds.
_SLICE = 1 << 15


def made(array: Array) -> torch.Tensor:
    """The array itself."""
    return array if isinstance(array, torch.Tensor) else array()


class Weight(NamedTuple):
    """A weight [K, C, ...], and factors that are folded into it one after the other, in float64."""

    tensor: torch.Tensor
    #: [K] each
    outputs: tuple[torch.Tensor, ...] = ()
    #: [C] each
    inputs: tuple[torch.Tensor, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """[K, C, ...]."""
        return self.tensor.shape

    def scaled(self, factor: torch.Tensor | None) -> Weight:
        """The same times `factor` [K]; None is 1."""
        return self if factor is None else Weight(self.tensor, (*self.outputs, factor), self.inputs)

    def behind(self, factor: torch.Tensor | None) -> Weight:
        """The same for an input that `factor` [C] multiplies; None is 1."""
        return self if factor is None else Weight(self.tensor, self.outputs, (*self.inputs, factor))

    def wide(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Outputs [begin, end), folded, float64."""
        wide = self.tensor[begin:end].double()
        others = [1] * (wide.dim() - 2)
        for factor in self.outputs:
            wide = wide * factor[begin:end].double().view(-1, 1, *others)
        for factor in self.inputs:
            wide = wide * factor.double().view(1, -1, *others)
        return wide

    def rounded(self, dtype: torch.dtype) -> torch.Tensor:
        """Folded, rounded once to `dtype`, and as the engine reads it: float32, contiguous."""
        if not self.outputs and not self.inputs:
            return self.tensor.to(dtype).float().contiguous()
        if torch.compiler.is_exporting():
            # each slice would be nodes of the graph
            return self.wide().to(dtype).float().contiguous()
        folded = torch.empty(self.shape)
        rows = max(1, _SLICE // self.shape[1:].numel())
        for begin in range(0, self.shape[0], rows):
            folded[begin : begin + rows] = self.wide(begin, begin + rows).to(dtype)
        return folded
