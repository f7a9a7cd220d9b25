"""Programs node by node: rows of integers and the arrays that the engine packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rows import act_code, pad_mode, row
from .weights import Array, Weight

#: (scale, shift), None where there is none; float64 or float32
Affine = tuple[torch.Tensor | None, torch.Tensor | None]
#: (weight, shift), None where there is none
Product = tuple[Weight, torch.Tensor | None]


class Geometry(NamedTuple):
    """How a convolution's window moves; `padding` is (top, bottom, left, right), None that of TensorFlow's 'same'."""

    kernel: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] | None = (0, 0, 0, 0)
    dilation: Sequence[int] = (1, 1)

    def columns(self, mode: str = "explicit") -> dict[str, int]:
        """The columns of a node's row; `mode` is how explicit padding is filled."""
        names = ("pad_top", "pad_bottom", "pad_left", "pad_right")
        pairs = {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
        axes = {f"{name}_{axis}": value for name, pair in pairs.items() for axis, value in zip("hw", pair, strict=True)}
        sides = (0, 0, 0, 0) if self.padding is None else self.padding
        number = pad_mode("same" if self.padding is None else mode)
        return {**axes, **dict(zip(names, sides, strict=True)), "pad_mode": number}


class Path(NamedTuple):
    """Keys or values: a depthwise convolution [C, 1, kh, kw] with its folded shift, or None; then a product [D, C]."""

    down: Product | None
    project: Product


class Builder:
    """Appends nodes; every method returns the new node's id.

    Args:
        channels: of the input.
        dtype: weights are rounded to it before they are kept in float32.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self.rows: list[list[int]] = []
        self.arrays: list[Array] = []
        self._dtype = dtype
        self.add("input", -1, channels=channels)

    @property
    def bfloat16(self) -> bool:
        """Whether the program multiplies in bfloat16 where the processor does."""
        return self._dtype == torch.bfloat16

    def add(self, kind: str, source: int, **values: int) -> int:
        """A node of `kind` on node `source`, whose arrays are those appended next."""
        self.rows.append(row(kind, source, len(self.arrays), **values))
        return len(self.rows) - 1

    def output(self, source: int, tag: int) -> int:
        """Hands out node `source` to runs that ask for `tag`."""
        return self.add("output", source, channels=tag)

    def convolution(
        self,
        kind: str,
        source: int,
        weight: Weight,
        shift: torch.Tensor | None,
        act: str,
        geometry: Geometry,
        residual: int = -1,
    ) -> int:
        """act(convolution + shift) + node `residual`; `kind` is conv, depthwise or pointwise, `weight` [K, C, kh, kw].

        The scale of a BatchNorm or layer scale is in the weight already.
        """
        channels = weight.shape[0]
        columns = geometry.columns()
        node = self.add(kind, source, residual=residual, channels=channels, act=act_code(act), **columns)
        self.product(weight, shift)
        return node

    def attention(
        self,
        source: int,
        norm: Affine | None,
        query: Product,
        key: Path,
        value: Path,
        output: Product,
        heads: int,
        geometry: Geometry | None,
        residual: int = -1,
    ) -> int:
        """Multi-query attention of norm(x), its output projection and node `residual`.

        Args:
            norm: scale and shift [C] of the BatchNorm before it. Keys and values that `geometry` down-samples see it
                exactly; it is in the weights of the others, and of `query`, already.
            query: [heads * Dk, C] and [heads * Dk].
            key: its product is [Dk, C].
            value: its product is [Dv, C].
            output: [K, heads * Dv] and [K].
            geometry: of both paths' depthwise convolutions.
        """
        inputs = query[0].shape[1]
        outputs = output[0].shape[0]
        columns = {} if geometry is None else geometry.columns()
        sizes = {"key_dim": key.project[0].shape[0], "value_dim": value.project[0].shape[0]}
        node = self.add("attention", source, residual=residual, channels=outputs, heads=heads, **sizes, **columns)
        scale, shift = (None, None) if norm is None else norm
        self.arrays += [torch.ones(inputs) if scale is None else scale.float(), self.vector(shift, inputs)]
        self.product(*query)
        for path in (key, value):
            if path.down is None:
                self.arrays += [torch.zeros(0), torch.zeros(inputs)]
            else:
                self.product(*path.down)
            self.product(*path.project)
        self.product(*output)
        return node

    def product(self, weight: Weight, shift: torch.Tensor | None) -> None:
        """Appends the arrays of a product or convolution."""
        self.arrays += [lambda: weight.rounded(self._dtype), self.vector(shift, weight.shape[0])]

    def vector(self, vector: torch.Tensor | None, size: int) -> torch.Tensor:
        """[size] as the engine reads it; zeros for None."""
        return torch.zeros(size) if vector is None else vector.float().contiguous()

    def finish(self) -> tuple[torch.Tensor, list[Array]]:
        """(program [nodes, fields] int64, arrays float32)."""
        return torch.tensor(self.rows, dtype=torch.int64), self.arrays
