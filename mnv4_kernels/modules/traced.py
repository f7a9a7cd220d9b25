"""Train mode in graphs of torch.compile: the steps of a `TrainingPlan`, over modules that Dynamo meets where they hang.

In train mode the parameters are inputs of the graph, so that it has their gradients. What an op can stand in for is
decided once, when the graph is made, and reaches the traced code as text, which is a constant to Dynamo; modules,
strides, statistics and modes are read in the traced code and guarded as timm's own would be.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import leaves
from .multi_query import MultiQuery
from .steps import Convolution, Own, Step
from .training import Pending, TrainingPlan, advance, written

#: the name of a module that is not there; others begin with a dot
_NONE = "-"


def describe(plan: TrainingPlan) -> str:
    """The plan's body as text for `TracedPlan`; empty where Dynamo can't trace its steps."""
    body = plan.body
    norms = [module for step in body.fused for module in step.modules() if type(module) in leaves.NORMS]
    if any(norm.momentum is None for norm in norms):
        # a cumulative average counts in a tensor, whose value a graph does not know
        return ""
    names = {id(module): f".{name}" for name, module in body.owner.named_modules()}

    def name(module: nn.Module | None) -> str:
        return _NONE if module is None else names[id(module)]

    lines = [f"{name(body.drop_path)} {'skip' if body.residual else _NONE}"]
    for step in body.steps:
        if isinstance(step, Convolution):
            parts = (step.conv, step.norm, step.act, step.layer_scale)
            lines.append(f"{'nhwc' if step.channels_last else 'conv'} {' '.join(map(name, parts))}")
        elif isinstance(step, MultiQuery):
            lines.append(f"attention {' '.join(map(name, (step.attention, step.norm, step.layer_scale)))}")
        else:
            assert isinstance(step, Own)
            lines.append(f"own {name(step.module)}")
    return "\n".join(lines)


class TracedPlan:
    """A `TrainingPlan` that Dynamo traces.

    Args:
        owner: the drop-in.
        text: what `describe` says of its plan.
    """

    def __init__(self, owner: nn.Module, text: str) -> None:
        self.owner = owner
        self.text = text

    def run(self, x: Any) -> Any:
        """The block's result; running statistics are updated."""
        return written(self.advance(Pending(x)))

    def advance(self, state: Pending) -> Pending:
        """The same where the input may be pending, and the result may stay so."""
        head, *lines = self.text.split("\n")
        drop_path, residual = head.split(" ")
        steps = [self._step(line) for line in lines]
        return advance(state, steps, residual == "skip", self._module(drop_path))

    def _step(self, line: str) -> Step:
        kind, *names = line.split(" ")
        modules = [self._module(name) for name in names]
        if kind == "attention":
            return MultiQuery(kind, *modules)
        if kind == "own":
            return Own(kind, modules[0], "")
        conv, norm, act, layer_scale = modules
        return Convolution(kind, conv, norm, act, layer_scale, kind == "nhwc")

    def _module(self, name: str) -> Any:
        if name == _NONE:
            return None
        module: Any = self.owner
        for part in name.split("."):
            if part:
                module = getattr(module, part)
        return module
