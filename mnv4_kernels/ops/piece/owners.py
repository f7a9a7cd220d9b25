"""Whose pieces the op runs: the patched modules of this process, by a number that no two ever share."""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch


class Owner(Protocol):
    """A module that can run pieces of itself, and tell what comes out without running them."""

    def _mnv4_execute(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """The piece `key` on `x`, by whatever path is right now."""

    def _mnv4_fake(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """An uninitialised tensor like the result."""


_NUMBERS = itertools.count(1)
_OWNERS: WeakValueDictionary[int, Owner] = WeakValueDictionary()


def remember(owner: Owner) -> int:
    """A number for `owner`, good for as long as it lives."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def owner_of(number: int) -> Owner:
    """Whose number it is; raises `RuntimeError` where its owner is gone."""
    owner = _OWNERS.get(number)
    if owner is None:
        raise RuntimeError(
            f"the patched module {number} of this graph is not in this process: compile the model again, or for "
            "another process export it (torch.export) or optimize it (mnv4_kernels.optimize)"
        )
    return owner
