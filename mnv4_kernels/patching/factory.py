"""`patch_timm`: from now on `timm.create_model` returns patched models. Explicit, global, reversible."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from .instances import apply

_NAME = "create_model"

#: (timm's module, what it held) for each place that `patch_timm` changed
_changed: list[tuple[Any, Callable[..., nn.Module]]] = []


def patch_timm() -> None:
    """Makes `timm.create_model` return patched models, in the whole process, until `unpatch_timm`.

    Every timm module that holds the function is changed. Code that imported it by name
    before (`from timm import create_model`) keeps the unpatched one. A model in which
    nothing can be replaced comes as it is. Calling it again changes nothing.
    """
    if _changed:
        return
    original = timm.create_model

    @functools.wraps(original)
    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = original(*args, **kwargs)
        apply(model)
        return model

    holders = [
        module
        for name, module in list(sys.modules.items())
        if (name == "timm" or name.startswith("timm.")) and vars(module).get(_NAME) is original
    ]
    for holder in holders:
        setattr(holder, _NAME, create_model)
        _changed.append((holder, original))


def unpatch_timm() -> None:
    """Gives `timm.create_model` back; models made meanwhile stay patched. Harmless without `patch_timm`."""
    while _changed:
        holder, original = _changed.pop()
        setattr(holder, _NAME, original)
