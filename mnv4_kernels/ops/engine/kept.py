"""Engines of weights that someone else holds, kept as long as those stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .handle import Engine


class _Made(NamedTuple):
    engine: Engine
    versions: list[int]
    pointers: list[int]
    #: keeps the storages, so that no other can come to lie at the same address
    anchors: list[torch.Tensor]


#: the first of the weights -> key -> what was made of it and the others
_ENGINES = WeakIdKeyDictionary()


def kept(tensors: Sequence[torch.Tensor], key: Hashable, make: Callable[[], Engine]) -> Engine:
    """What `make` gave for `tensors` and `key`; made anew when one of them was written to or replaced.

    Whoever runs it holds it: another thread may put a newer one into its place.
    """
    if any(tensor.is_inference() for tensor in tensors):
        # no version counters: an edit would leave no trace
        return make()
    versions = [tensor._version for tensor in tensors]
    pointers = [tensor.data_ptr() for tensor in tensors]
    known: dict[Hashable, _Made] = _ENGINES.setdefault(tensors[0], {})
    found = known.get(key)
    if found is None or found.versions != versions or found.pointers != pointers:
        found = known[key] = _Made(make(), versions, pointers, [tensor.detach() for tensor in tensors])
    return found.engine
