"""Schemas of the CPU engine's ops. They have no reference: without the C++ library there is no engine."""

from __future__ import annotations

import torch

from .._contract import LIBRARY, NAMESPACE
from .programs import program_of

LIBRARY.define("engine_create(Tensor program, Tensor[] arrays, bool bfloat16) -> int")
LIBRARY.define("engine_run(int handle, Tensor x, int tag) -> Tensor[]")
LIBRARY.define("engine_profile(int handle, Tensor x, int tag, int repeats) -> (Tensor, Tensor, str)")
LIBRARY.define("engine_free(int handle) -> ()")

_ops = getattr(torch.ops, NAMESPACE)
engine_create = _ops.engine_create.default
engine_run = _ops.engine_run.default
engine_profile = _ops.engine_profile.default
engine_free = _ops.engine_free.default


def _fake_run(handle: int, x: torch.Tensor, tag: int) -> list[torch.Tensor]:
    """The outputs of `tag`, float32 and contiguous."""
    if x.dim() != 4:
        raise ValueError(f"`x` must have four dimensions [N, C, H, W], got {tuple(x.shape)}")
    shapes = program_of(handle).output_shapes(tuple(x.shape), tag)
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


torch.library.register_fake(f"{NAMESPACE}::engine_run", _fake_run, lib=LIBRARY)
