"""An engine for as long as someone holds it."""

from __future__ import annotations

import weakref

import torch

from .contract import engine_arrays, engine_create, engine_free
from .programs import forget, remember


class Engine:
    """Packs `program` [nodes, fields] int64 and its float32 `arrays`; freed with the last reference.

    With `bfloat16` it multiplies in bfloat16 where the processor does.

    Attributes:
        handle: what `engine_run` takes; no two engines of a process have the same.
    """

    def __init__(self, program: torch.Tensor, arrays: list[torch.Tensor], bfloat16: bool = False) -> None:
        self.handle: int = engine_create(program, arrays, bfloat16)
        remember(self.handle, program)
        self._shapes = [array.shape for array in arrays]
        weakref.finalize(self, _free, self.handle)

    def arrays(self) -> list[torch.Tensor]:
        """The arrays that it was made from, unpacked: with `bfloat16` rounded as they are stored."""
        stored = engine_arrays(self.handle)
        return [array.reshape(shape) for array, shape in zip(stored, self._shapes, strict=True)]


def _free(handle: int) -> None:
    forget(handle)
    engine_free(handle)
