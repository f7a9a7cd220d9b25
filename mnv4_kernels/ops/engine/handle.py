"""An engine for as long as someone holds it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from ...backends import native
from .contract import engine_arrays, engine_create, engine_pack
from .programs import forget, remember
from .weights import Array, made


class Engine:
    """Packs `program` [nodes, fields] int64 and its float32 `arrays`; freed with the last reference.

    Arrays are made one after the other, and each is dropped when it is packed.

    With `bfloat16` it multiplies in bfloat16 where the processor does.

    Attributes:
        handle: what `engine_run` takes; no two engines of a process have the same.
    """

    def __init__(self, program: torch.Tensor, arrays: Sequence[Array], bfloat16: bool = False) -> None:
        self.handle: int = engine_create(program, len(arrays), bfloat16)
        # what a process holds at its end goes with it
        weakref.finalize(self, _free, self.handle, native.module().engine_free).atexit = False
        remember(self.handle, program)
        self._shapes = [self._pack(number, made(array)) for number, array in enumerate(arrays)]

    def _pack(self, number: int, array: torch.Tensor) -> torch.Size:
        engine_pack(self.handle, number, array)
        return array.shape

    def arrays(self) -> list[torch.Tensor]:
        """The arrays that it was made from, unpacked: with `bfloat16` rounded as they are stored."""
        stored = engine_arrays(self.handle)
        return [array.reshape(shape) for array, shape in zip(stored, self._shapes, strict=True)]


def _free(handle: int, free: Callable[[int], None]) -> None:
    # garbage is collected at any time, under any tracer and mode: no op of torch here
    forget(handle)
    free(handle)
