"""Schema, fake and dispatch of `subnetwork`, which runs an engine that it keeps as long as the parameters stay.

It has no reference: without the C++ library there is no engine, and then nobody puts it into a graph.
"""

from __future__ import annotations

import functools

import torch

from .._contract import LIBRARY, NAMESPACE
from ..engine import Engine, engine_run, kept
from ..engine.programs import decoded
from ..layout import memory_format_of
from . import recipe as recipes

# flexible_layout: it takes x as it lies, see `piece`
LIBRARY.define(
    "subnetwork(Tensor x, Tensor[] tensors, str program, str recipe) -> Tensor[]", tags=(torch.Tag.flexible_layout,)
)


def _run(x: torch.Tensor, tensors: list[torch.Tensor], program: str, recipe: str) -> list[torch.Tensor]:
    # held here: another thread may put a newer one into its place
    engine = kept(tensors, (program, recipe), lambda: _made(tensors, program, recipe))
    results = engine_run(engine.handle, x, 0)
    return [_like(y, x) for y in results]


def _made(tensors: list[torch.Tensor], program: str, recipe: str) -> Engine:
    rows = torch.tensor([[int(value) for value in row.split(" ")] for row in program.split(";")])
    with torch.no_grad():
        return Engine(rows, recipes.arrays_of(_decoded(recipe), tensors), tensors[0].dtype == torch.bfloat16)


@functools.lru_cache(maxsize=64)
def _decoded(recipe: str) -> list[recipes.Fold | recipes.Mean]:
    return recipes.decode(recipe)


def _fake(x: torch.Tensor, tensors: list[torch.Tensor], program: str, recipe: str) -> list[torch.Tensor]:
    shapes = decoded(program).output_shapes(tuple(x.shape), 0)
    return [_like(x.new_empty(shape, dtype=torch.float32), x) for shape in shapes]


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`y` in `x`'s dtype, a map also in its memory format."""
    return y.to(x.dtype, memory_format=memory_format_of(x)) if y.dim() == 4 else y.to(x.dtype)


LIBRARY.impl("subnetwork", _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::subnetwork", _fake, lib=LIBRARY)

subnetwork = getattr(torch.ops, NAMESPACE).subnetwork.default
