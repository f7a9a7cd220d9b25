"""Schemas of the CPU engine's ops. They have no reference: without the C++ library there is no engine."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import native
from .._contract import LIBRARY, NAMESPACE
from ..layout import memory_format_of
from .programs import Program, decoded, program_of

LIBRARY.define("engine_create(Tensor program, int arrays, bool bfloat16) -> int")
LIBRARY.define("engine_pack(int handle, int number, Tensor array) -> ()")
LIBRARY.define("engine_run(int handle, Tensor x, int tag) -> Tensor[]")
LIBRARY.define("engine_profile(int handle, Tensor x, int tag, int repeats) -> (Tensor, Tensor, str)")
LIBRARY.define("engine_arrays(int handle) -> Tensor[]")

_ops = getattr(torch.ops, NAMESPACE)
engine_create = _ops.engine_create.default
engine_pack = _ops.engine_pack.default
engine_run = _ops.engine_run.default
engine_profile = _ops.engine_profile.default
engine_arrays = _ops.engine_arrays.default

# the same without state, for exported programs: the weights are an argument, the program is text. Their schemas are
# in the C++ library (csrc/ops/engine.cpp)
program_bytes: Any = _ops.program_bytes.default if native.available() else None
program_pack: Any = _ops.program_pack.default if native.available() else None
program_run: Any = _ops.program_run.default if native.available() else None


def _fake_run(handle: int, x: torch.Tensor, tag: int) -> list[torch.Tensor]:
    return _outputs(program_of(handle), x, tag, memory_format_of(x))


def _fake_pack(program: str, arrays: list[torch.Tensor], bfloat16: bool) -> torch.Tensor:
    return arrays[0].new_empty(program_bytes(program, bfloat16), dtype=torch.uint8)


def _fake_program_run(
    program: str, packed: torch.Tensor, x: torch.Tensor, bfloat16: bool, tag: int
) -> list[torch.Tensor]:
    return _outputs(decoded(program), x, tag, torch.contiguous_format)


def _outputs(program: Program, x: torch.Tensor, tag: int, memory_format: torch.memory_format) -> list[torch.Tensor]:
    """The outputs of `tag`, float32, maps in `memory_format`."""
    if x.dim() != 4:
        raise ValueError(f"`x` must have four dimensions [N, C, H, W], got {tuple(x.shape)}")
    shapes = program.output_shapes(tuple(x.shape), tag)
    return [
        torch.empty(
            shape,
            dtype=torch.float32,
            device=x.device,
            memory_format=memory_format if len(shape) == 4 else torch.contiguous_format,
        )
        for shape in shapes
    ]


def _no_gradients(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("a program of the engine has no gradients: export the model in train mode or unpatched for them")


torch.library.register_fake(f"{NAMESPACE}::engine_run", _fake_run, lib=LIBRARY)
if native.available():
    torch.library.register_fake(f"{NAMESPACE}::program_pack", _fake_pack, lib=LIBRARY)
    torch.library.register_fake(f"{NAMESPACE}::program_run", _fake_program_run, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::program_pack", _no_gradients, lib=LIBRARY)
    torch.library.register_autograd(f"{NAMESPACE}::program_run", _no_gradients, lib=LIBRARY)
