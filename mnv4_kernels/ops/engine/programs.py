"""What each living engine was made from, so that its results' shapes are known without running it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...backends import native

#: Sizes may be symbols while torch.compile traces.
Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """The rows of a program by the columns' names, in execution order."""

    rows: tuple[dict[str, int], ...]
    kinds: tuple[str, ...]
    pad_modes: tuple[str, ...]

    @classmethod
    def decode(cls, rows: Iterable[Iterable[int]]) -> Program:
        """From the integers [nodes, fields] that the engine is created from."""
        library = native.module()
        fields = tuple(library.engine_fields())
        named = tuple(dict(zip(fields, row, strict=True)) for row in rows)
        return cls(named, tuple(library.engine_kinds()), tuple(library.engine_pad_modes()))

    def output_shapes(self, shape: Shape, tag: int) -> list[Shape]:
        """Shapes of the outputs of `tag` for an input [N, C, H, W]: maps [N, C, H, W], and [N, K] behind the pool.

        The same expressions as the planner's, so that sizes may be symbols.
        """
        results = zip(self.rows, self.shapes(shape), strict=True)
        return [y for row, y in results if self.kinds[row["kind"]] == "output" and row["channels"] == tag]

    def shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of all nodes' results for an input [N, C, H, W]."""
        shapes: list[Shape] = []
        for row in self.rows:
            shapes.append(self._result(row, shapes[row["input"]] if shapes else shape))
        return shapes

    def _result(self, row: dict[str, int], source: Shape) -> Shape:
        kind = self.kinds[row["kind"]]
        if kind in ("input", "output"):
            return source
        if kind == "pool":
            return source[:2]
        if kind in ("conv", "depthwise"):
            height = self._axis(row, source[2], "h", "top", "bottom")
            width = self._axis(row, source[3], "w", "left", "right")
            return (source[0], row["channels"], height, width)
        return (source[0], row["channels"], *source[2:])

    def _axis(self, row: dict[str, int], size: Any, axis: str, before: str, after: str) -> Any:
        stride = row[f"stride_{axis}"]
        if self.pad_modes[row["pad_mode"]] == "same":
            return (size + stride - 1) // stride
        padding = row[f"pad_{before}"] + row[f"pad_{after}"]
        return (size + padding - row[f"dilation_{axis}"] * (row[f"kernel_{axis}"] - 1) - 1) // stride + 1


def encode(rows: Iterable[Iterable[int]]) -> str:
    """The rows [nodes, fields] as text, one string being a constant of a graph where a tensor is not."""
    return ";".join(" ".join(map(str, row)) for row in rows)


@functools.lru_cache(maxsize=64)
def decoded(text: str) -> Program:
    """What `encode` was given."""
    return Program.decode([[int(value) for value in row.split(" ")] for row in text.split(";")])


_PROGRAMS: dict[int, Program] = {}


def remember(handle: int, program: torch.Tensor) -> None:
    """`handle` was created from `program` [nodes, fields]."""
    _PROGRAMS[handle] = Program.decode(program.tolist())


def forget(handle: int) -> None:
    """`handle` is about to be freed."""
    _PROGRAMS.pop(handle, None)


def program_of(handle: int) -> Program:
    """What `handle` was created from; raises `ValueError` for one that is not alive."""
    if handle not in _PROGRAMS:
        raise ValueError(f"`handle` must be that of a living engine, got {handle}")
    return _PROGRAMS[handle]
