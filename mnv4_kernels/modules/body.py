"""A body: what a block computes, as steps in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .steps import Fused, Own, Step


class Body:
    """What a block computes: steps in order, and whether the input is added to the result.

    Args:
        owner: the drop-in.
        steps: in the order in which they run.
        residual: y = steps(x) + x.
        drop_path: stochastic depth of the steps before the input is added; eval mode has none.
        bypassed: the modules that don't run under a plan; by default all submodules of
            `owner` but those of `Own` steps.
        settings: (module, attribute names) that decided on the steps.
    """

    def __init__(
        self,
        owner: nn.Module,
        steps: Sequence[Step],
        *,
        residual: bool = False,
        drop_path: nn.Module | None = None,
        bypassed: Sequence[nn.Module] | None = None,
        settings: Sequence[tuple[nn.Module, Sequence[str]]] = (),
    ) -> None:
        self.owner = owner
        self.steps = list(steps)
        self.residual = residual
        self.drop_path = drop_path
        self.settings = settings
        if bypassed is None:
            called = {module for step in steps if isinstance(step, Own) for module in step.module.modules()}
            bypassed = [module for module in owner.modules() if module is not owner and module not in called]
        self.bypassed = bypassed

    @property
    def fused(self) -> list[Fused]:
        """The steps that ops compute."""
        return [step for step in self.steps if not isinstance(step, Own)]

    @property
    def own(self) -> list[Own]:
        """The steps that keep timm's modules."""
        return [step for step in self.steps if isinstance(step, Own)]


def formula_of(body: Body, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """What timm computes in eval mode, over explicit tensors of what ops compute."""
    y, start = x, 0
    for step in body.steps:
        if isinstance(step, Own):
            y = step.module(y)
            continue
        end = start + len(step.tensors())
        y = step.formula(y, tensors[start:end])
        start = end
    return y + x if body.residual else y


def fake_of(body: Body, x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor like a body's result on the fake tensor `x`, whose sizes may be symbols."""
    for step in body.steps:
        x = _fake_of_own(step.module, x) if isinstance(step, Own) else step.fake(x)
    return x


def _fake_of_own(module: nn.Module, x: Any) -> torch.Tensor:
    """What a module of timm's gives for a fake tensor: its own code runs, on fake parameters."""
    mode = x.fake_mode
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in tensors.items()}
    y: torch.Tensor = torch.func.functional_call(module, fakes, (x,))
    return y


def dtype_of(steps: Sequence[Fused]) -> torch.dtype | None:
    """The dtype of all convolutions' weights; None where there are several, or no convolution."""
    dtypes = {module.weight.dtype for step in steps for module in step.modules() if isinstance(module, nn.Conv2d)}
    return dtypes.pop() if len(dtypes) == 1 else None
