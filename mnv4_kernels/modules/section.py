"""A whole block as one step of a larger plan, so that a network is one plan.

Seventeen blocks that each ask whether anything changed cost more than one network that
asks once: 130 us against 60 us a call of conv_small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from . import leaves
from .body import Body, fake_of, formula_of
from .dropin import DropIn, make_room
from .program import pool_obstacle
from .steps import Call, Own, Step


@dataclasses.dataclass(frozen=True)
class Section:
    """A block all of whose steps are ops, or pools that the engine computes."""

    name: str
    block: DropIn
    body: Body

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the block calls."""
        return tuple(op for step in self.body.fused for op in step.ops)

    @property
    def takes_residual(self) -> bool:
        """Its own skip is inside."""
        return False

    def modules(self) -> list[nn.Module]:
        """The modules that the ops stand in for."""
        return [module for step in self.body.fused for module in step.modules()]

    def tensors(self) -> list[torch.Tensor | None]:
        """Those of its steps, in order."""
        return [tensor for step in self.body.fused for tensor in step.tensors()]

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""
        return formula_of(self.body, x, tensors)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""
        return fake_of(self.body, x)

    def prepare(self) -> Call:
        """The call of the block's own plan, which only a change of this block makes anew."""
        return cast(Call, self.block._mnv4_plan().call)


def sections(name: str, module: nn.Module) -> list[Step]:
    """The blocks in `module` (drop-ins in nested Sequentials) as sections; what is neither stays timm's own."""
    if type(module) is nn.Sequential and not leaves.tampered(module):
        # not `children()`, which gives a block that is used twice once
        return [step for child, inner in module._modules.items() for step in sections(f"{name}.{child}", inner)]
    if not isinstance(module, DropIn):
        return [Own(name, module, f"{type(module).__name__} is no drop-in")]
    if leaves.tampered(module) or type(module)._mnv4_base not in type(module).__bases__:
        return [Own(name, module, leaves.tampered(module) or f"{type(module).__name__} may compute something else")]
    body = module._mnv4_body("")
    on_gpu = any(map(leaves.on_gpu, module.parameters()))
    if not body.fused or any(on_gpu or pool_obstacle(step) for step in body.own):
        return [Own(name, module, "some of its pieces are timm's own")]
    make_room(module)
    return [Section(name, module, body)]
