"""Schema and dispatch of `piece`. It has no kernel of its own: its owner's plan calls the ops.

The parameters are not arguments. As inputs of the graph they would each be guarded and
passed at every call, 450 us for conv_small_035, which runs in 260; the plan asks in
20 whether any of them changed.
"""

from __future__ import annotations

import torch

from .._contract import LIBRARY, NAMESPACE
from .owners import owner_of

# `structure` is the owner's repr, hashed: caches on disk know a graph by its text, and a number means
# another module in another process
# and a replay of recorded launches would not see that a parameter changed
LIBRARY.define(
    "piece(Tensor x, int owner, str key, str structure) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe),
)


def _run(x: torch.Tensor, owner: int, key: str, structure: str) -> torch.Tensor:
    return owner_of(owner)._mnv4_execute(x, key)


def _fake(x: torch.Tensor, owner: int, key: str, structure: str) -> torch.Tensor:
    return owner_of(owner)._mnv4_fake(x, key)


LIBRARY.impl("piece", _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::piece", _fake, lib=LIBRARY)

piece = getattr(torch.ops, NAMESPACE).piece.default
