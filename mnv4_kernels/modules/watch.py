"""Whether the modules behind a plan are still what they were when it was made.

A plan holds folded copies of parameters. `Watch.unchanged` sees a parameter, buffer or
submodule exchanged, an in-place edit (version counters), new storage behind the same
tensor (`.data = ...`, as `.to()` does) and edited attributes such as `stride` or `eps`.
What it can't see are edits that leave no trace in the tensor, in place through `.data` or
numpy, and a buffer's `.data = ...`: `mnv4_kernels.refresh(model)` is for those.

It runs at every call of every block, so that all of it is a few comparisons in C over
lists made once: about 3 us for a block of four convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from . import leaves

_version = attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr
_training = itemgetter("training")
_forward_hooks = (itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks"))
_backward_hooks = (itemgetter("_backward_hooks"), itemgetter("_backward_pre_hooks"))

# the attributes that a plan reads off a module of each kind
_CONV = ("stride", "padding", "dilation", "padding_mode")
_NORM = ("eps",)
_GELU = ("approximate",)
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_BLUR = ("stride", "pad_mode", "padding", "filt_size")


HOOKED = "a forward hook on an inner module, or a global one"
TRAINING_INSIDE = "an inner normalisation or dropout is in train mode"


class Watch:
    """Remembers modules: their tensors, their submodules, their settings and their hooks.

    Args:
        owner: the drop-in; only its submodules and the settings named for it are watched.
        bypassed: the modules that the plan's ops stand in for.
        settings: further (module, attribute names) that the plan read.
    """

    __slots__ = (
        "_anchors",
        "_hooked",
        "_live",
        "_modes",
        "_modules",
        "_parameters",
        "_pointers",
        "_registered",
        "_settings",
        "_sizes",
        "_snapshot",
        "_states",
        "_tensors",
        "_values",
        "_versions",
    )

    def __init__(
        self,
        owner: nn.Module,
        bypassed: Sequence[nn.Module],
        settings: Iterable[tuple[nn.Module, Sequence[str]]] = (),
    ) -> None:
        dicts: list[dict[str, Any]] = [owner._modules]
        for module in bypassed:
            dicts += filter(None, (module._parameters, module._buffers, module._modules))
        self._live = dicts
        self._snapshot = [dict(entries) for entries in dicts]
        tensors: list[torch.Tensor] = [
            value
            for entries in dicts[1:]
            for name, value in entries.items()
            if type(value) in (torch.Tensor, nn.Parameter) and name != "num_batches_tracked"
        ]
        # inference tensors have no version: no plan is made of them, see `leaves.tensor_reasons`
        self._tensors = [tensor for tensor in dict.fromkeys(tensors) if not tensor.is_inference()]
        self._versions = sum(map(_version, self._tensors))
        # `.to()` gives a parameter other storage, but makes other buffers
        self._parameters = [tensor for tensor in self._tensors if isinstance(tensor, nn.Parameter)]
        self._pointers = list(map(_data_ptr, self._parameters))
        # keeps the storages, so that no other can come to lie at the same address
        self._anchors = [tensor.detach() for tensor in self._parameters]
        self._modules = list(bypassed)
        self._states = [vars(module) for module in bypassed]
        self._sizes = sum(map(len, self._states))
        self._settings = _getters(bypassed, settings)
        self._values = [list(map(getter, states)) for getter, states in self._settings]
        # only these compute something else in train mode
        self._modes = [vars(module) for module in bypassed if _has_modes(module)]
        # not known until `hooked` looks
        self._hooked, self._registered = True, -1

    def unchanged(self) -> bool:
        """True while everything that the plan was made of is as it was."""
        try:
            return (
                self._live == self._snapshot
                and sum(map(_version, self._tensors)) == self._versions
                and list(map(_data_ptr, self._parameters)) == self._pointers
                and sum(map(len, self._states)) == self._sizes
                and [list(map(getter, states)) for getter, states in self._settings] == self._values
            )
        except (RuntimeError, TypeError, ValueError, KeyError):
            # an exchanged tensor is compared by value with the one that was there, which may not be possible
            return False

    def same_modules(self) -> bool:
        """The same but for the values of tensors: enough for a plan that reads them at each call."""
        try:
            return (
                self._live == self._snapshot
                and sum(map(len, self._states)) == self._sizes
                and [list(map(getter, states)) for getter, states in self._settings] == self._values
            )
        except (RuntimeError, TypeError, ValueError, KeyError):
            return False

    def hooked(self) -> bool:
        """True if an inner module, or all modules, have a forward hook."""
        # torch counts the hooks that were ever registered: while that count stands, none is new
        registered = RemovableHandle.next_id
        if self._hooked or registered != self._registered:
            self._hooked = _any_hooked(self._states)
            self._registered = registered
        return self._hooked

    def obstacle(self) -> str:
        """Why the modules must be called one by one now, as a sentence; empty: they need not."""
        if self.hooked():
            return HOOKED
        return TRAINING_INSIDE if any(map(_training, self._modes)) else ""

    def watched(self) -> tuple[list[torch.Tensor], list[object]]:
        """(the tensors, what holds them: modules and their dicts)."""
        return self._tensors, [*self._live, *self._modules]

    def wants_grad(self) -> bool:
        """True if a parameter requires grad."""
        return any(tensor.requires_grad for tensor in self._tensors)

    def backward_hooked(self) -> bool:
        """True if an inner module, or all modules, have a backward hook."""
        hooks = torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
        return bool(hooks) or any(any(map(kind, self._states)) for kind in _backward_hooks)


def obstacle_of(modules: Sequence[nn.Module]) -> str:
    """`Watch.obstacle` without a watch: why `modules` must be called one by one now."""
    if _any_hooked([vars(module) for module in modules]):
        return HOOKED
    return TRAINING_INSIDE if any(module.training for module in modules if _has_modes(module)) else ""


def _any_hooked(states: Sequence[dict[str, Any]]) -> bool:
    hooks = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(hooks) or any(any(map(kind, states)) for kind in _forward_hooks)


def _has_modes(module: nn.Module) -> bool:
    idle = type(module) is nn.Identity
    return not idle and (type(module) in leaves.NORMS - leaves.FROZEN_NORMS | leaves.DROPS | leaves.ATTENTIONS)


def _getters(
    bypassed: Sequence[nn.Module], settings: Iterable[tuple[nn.Module, Sequence[str]]]
) -> list[tuple[Any, list[dict[str, Any]]]]:
    """(getter, the `__dict__`s that it is applied to) for each kind of setting."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for module in bypassed:
        if type(module) in leaves.CONVS:
            groups.setdefault(_CONV, []).append(vars(module))
        elif type(module) in leaves.NORMS:
            groups.setdefault(_NORM, []).append(vars(module))
        elif type(module) is nn.GELU:
            groups.setdefault(_GELU, []).append(vars(module))
        elif type(module) is nn.AvgPool2d:
            groups.setdefault(_AVERAGE, []).append(vars(module))
        elif type(module) in leaves.BLUR_POOLS:
            groups.setdefault(_BLUR, []).append(vars(module))
    for module, names in settings:
        groups.setdefault(tuple(names), []).append(vars(module))
    return [(itemgetter(*names), states) for names, states in groups.items()]
