"""What every drop-in is: timm's class with a forward that takes the fused path where it may.

A drop-in class is `class FusedX(XForward, timm's X)`. `super().forward` is timm's own
path, which also runs the drop-ins among its submodules; so whatever keeps a block from
running as a whole still leaves its pieces their kernels.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any, cast

import torch
from torch import nn

from ..backends.torch_internals import (
    constant_in_graphs,
    edited_in_graph,
    exporting_onnx,
    jit_tracing_state,
    transformed,
)
from ..environment import Switches
from ..ops.layout import memory_format_of
from ..ops.piece import piece, remember
from ..ops.support import dtype_name
from . import leaves
from .body import Body, fake_of
from .exported import export_piece
from .plan import Plan
from .traced import TracedPlan, describe
from .training import TrainingPlan

#: The plans' place in a drop-in's `__dict__`; not a buffer, so that no state_dict shows it.
PLANS = "_mnv4_plans"

#: marks the keys of train mode's plans
TRAINING = "training"

#: Its number in compiled graphs, which torch.compile guards on: no other module meets its code.
NUMBER = "_mnv4_number"

HEADS = "train mode: pool and classifier are timm's modules, the convolution between them has its op"
EXPORTING_TRAINING = "torch.export in train mode traces timm's own path"
COMPILING_GRADIENTS = "torch.compile with gradients enabled: the ops' graphs are made under torch.no_grad()"
ONNX = "torch.onnx.export: ONNX has no such ops, timm's own path is exported"
COMPILING_TRAINING_GPU = "torch.compile of a model in train mode on a GPU traces timm's own path"
EXPORTING_GPU = "torch.export of a model on a GPU traces timm's own path"
TRACING = "torch.jit traces timm's own path"
TRANSFORMED = "inside a torch.func transform or forward-mode AD"
AUTOCAST = "under autocast, whose rounding timm's own path keeps"


# the switch that turns everything off; a plan has those of its ops
_SWITCH = Switches(())


class DropIn(nn.Module):
    """Mixin of all drop-ins: plans that are made at need, dropped by copies, and watched."""

    #: the forward that the patch replaced; `unpatch` gives it back
    _mnv4_base: type[nn.Module]
    #: see `NUMBER`
    _mnv4_number: int

    def _mnv4_body(self, key: str) -> Body:
        """What the piece `key` of this module computes."""
        raise NotImplementedError

    def _mnv4_plan(self, key: str = "") -> Plan:
        """The current plan of a piece, made anew if anything behind it changed."""
        plans = self.__dict__.get(PLANS)
        if plans is None:
            plans = make_room(self)
        plan = plans.get(key)
        if plan is None or not plan.watch.unchanged():
            plan = plans[key] = Plan(self._mnv4_body(key))
        return plan

    def _mnv4_obstacle(self, x: Any) -> str:
        """Why the module takes timm's own path for the input `x` whatever its parameters are; empty: it need not."""
        if torch.compiler.is_compiling():
            return _traced_obstacle(x, self.training)
        if type(x) is not torch.Tensor or x.dim() != 4 or not x.is_cpu or x.dtype not in leaves.DTYPES:
            obstacle = _input_obstacle(x)
            if obstacle:
                return obstacle
        if jit_tracing_state() is not None:
            return TRACING
        if transformed():
            return TRANSFORMED
        if not self.training and torch.is_autocast_enabled(x.device.type):
            return AUTOCAST
        return _SWITCH.obstacle()

    #: pieces that timm's modules compute in train mode
    _mnv4_eval_only: frozenset[str] = frozenset()

    def _mnv4_training_plan(self, key: str = "") -> TrainingPlan:
        """The current plan of a piece in train mode, made anew if a module behind it changed."""
        plans: dict[Any, Any] = self.__dict__.get(PLANS) or make_room(self)
        plan = plans.get((TRAINING, key))
        if plan is None or not plan.watch.same_modules():
            plan = plans[TRAINING, key] = TrainingPlan(self._mnv4_body(key))
        return cast(TrainingPlan, plan)

    def _mnv4_decide(self, x: Any, key: str = "") -> tuple[Plan | TrainingPlan | None, str]:
        """(the plan that runs the piece `key` on `x`, "") or (the plan or None, why timm's own path runs)."""
        obstacle = self._mnv4_obstacle(x)
        if obstacle:
            return None, obstacle
        if self.training:
            if key in self._mnv4_eval_only:
                return None, HEADS
            training_plan = self._mnv4_training_plan(key)
            return training_plan, training_plan.obstacle_of(x.dtype, x.device)
        plan = self._mnv4_plan(key)
        obstacle = plan.obstacle or plan.switches.obstacle() or plan.watch.obstacle()
        if not obstacle and plan.dtype is not x.dtype:
            obstacle = f"the input is {dtype_name(x.dtype)}, the parameters are {dtype_name(plan.dtype)}"
        if not obstacle and plan.device != x.device:
            obstacle = f"the input is on {x.device}, the parameters are on {plan.device}"
        if not obstacle and torch.is_grad_enabled() and (x.requires_grad or plan.watch.wants_grad()):
            obstacle = plan.grad_obstacle()
        return plan, obstacle

    def _mnv4_trainer(self, x: Any, key: str = "") -> TrainingPlan | TracedPlan | None:
        """What runs the piece `key` on `x` in train mode; None where timm's own path must run."""
        if torch.compiler.is_compiling():
            if key in self._mnv4_eval_only or self._mnv4_obstacle(x):
                return None
            text = _training_text(self, key, x.dtype, x.device)
            return TracedPlan(self, text) if text else None
        plan, obstacle = self._mnv4_decide(x, key)
        return plan if isinstance(plan, TrainingPlan) and not obstacle else None

    def _mnv4_run(self, x: torch.Tensor, key: str = "") -> torch.Tensor | None:
        """The piece `key` on `x` [N, C, H, W] by its plan; None where timm's own path must run."""
        if torch.compiler.is_compiling():
            return self._mnv4_trace(x, key)
        plan, obstacle = self._mnv4_decide(x, key)
        if plan is None or obstacle:
            return None
        if isinstance(plan, TrainingPlan):
            return plan.run(x)
        if torch.is_grad_enabled() and (x.requires_grad or plan.watch.wants_grad()):
            return plan.run_differentiably(x)
        return plan.run(x)

    def _mnv4_trace(self, x: torch.Tensor, key: str) -> torch.Tensor | None:
        """The piece `key` as one op of the graph that torch.compile makes; None where it must trace timm's own path."""
        if self.training:
            plan = self._mnv4_trainer(x, key)
            return None if plan is None else plan.run(x)
        if self._mnv4_obstacle(x):
            return None
        if torch.compiler.is_exporting():
            return export_piece(self, key, x)
        structure = _traceable(self, key, x.dtype, x.device)
        if not structure:
            return None
        y: torch.Tensor = piece(x, self._mnv4_number, key, structure)
        return y

    def _mnv4_execute(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """What a compiled graph's op does: what eager does, so that whatever changed since is seen."""
        plan, obstacle = self._mnv4_decide(x, key)
        if plan is not None and not obstacle:
            return plan.run(x)
        return self._mnv4_otherwise(x, key)

    def _mnv4_otherwise(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """The piece `key` where its plan may not run, in the memory format in which the plan gives it."""
        y: torch.Tensor = self._mnv4_base.forward(self, x)
        return y.contiguous(memory_format=memory_format_of(x))

    def _mnv4_fake(self, x: torch.Tensor, key: str) -> torch.Tensor:
        """Uninitialised, like the result of the piece `key` on the fake tensor `x`."""
        return fake_of(self._mnv4_body(key), x)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no plans: they hold folded weights of this very instance."""
        return {name: value for name, value in self.__dict__.items() if name not in (PLANS, NUMBER)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        make_room(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks each module for what to compile; a drop-in's forward is not TorchScript."""
        raise RuntimeError("torch.jit.script can't compile a patched model: call mnv4_kernels.unpatch(model) first")


class BlockForward(DropIn):
    """A drop-in that is one piece as a whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, H', W'], in `x`'s memory format."""
        y = self._mnv4_run(x)
        return super().forward(x) if y is None else y


def make_room(module: nn.Module) -> dict[str, Plan]:
    """The place for `module`'s plans, made now: a `Watch` takes a later attribute for a change."""
    if NUMBER not in module.__dict__:
        module.__dict__[NUMBER] = remember(module)  # type: ignore[arg-type]
    plans: dict[str, Plan] = module.__dict__.setdefault(PLANS, {})
    return plans


def leave_room(module: nn.Module) -> None:
    """Takes away what `make_room` gave."""
    for name in (PLANS, NUMBER):
        module.__dict__.pop(name, None)


def refresh(model: nn.Module) -> None:
    """Forgets what was folded of `model`'s parameters; the next call reads them anew.

    Needed only after edits that leave no trace in a tensor: in place through `.data`, a
    numpy view or another process's memory. For patched models, compiled or not, and for
    models compiled by the backend "mnv4_kernels".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, DropIn):
            make_room(module).clear()
    # for engines of compiled graphs, which are kept by their tensors' versions
    torch.autograd.graph.increment_version([*model.parameters(), *model.buffers()])


def _traced_obstacle(x: Any, training: bool) -> str:
    """Why a graph of torch.compile gets timm's own path for the input `x`; empty: it need not."""
    if torch.compiler.is_exporting():
        if training:
            return EXPORTING_TRAINING
        if exporting_onnx():
            _say_onnx()
            return ONNX
        if leaves.on_gpu(x):
            return EXPORTING_GPU
        plain = x.dim() == 4 and x.is_cpu and x.dtype in leaves.DTYPES
        return AUTOCAST if torch.is_autocast_enabled("cpu") else "" if plain else _input_obstacle(x)
    if training and leaves.on_gpu(x):
        return COMPILING_TRAINING_GPU
    # parameters are no inputs of the op: nothing would tell that they require gradients
    if torch.is_grad_enabled() and not training:
        return COMPILING_GRADIENTS
    if torch.is_autocast_enabled(x.device.type):
        return AUTOCAST
    return TRANSFORMED if transformed() else _input_obstacle(x)


@constant_in_graphs
def _say_onnx() -> None:
    # said once an export by Python's filter: every block comes by
    warnings.warn(f"mnv4_kernels: {ONNX}, as from the unpatched model", stacklevel=2)


@constant_in_graphs
def _traceable(module: DropIn, key: str, dtype: torch.dtype, device: torch.device) -> str:
    """What the graph's op is told of `module`'s structure; empty where timm's own path must be traced."""
    plan = module._mnv4_plan(key)
    if plan.obstacle or plan.switches.obstacle() or plan.watch.obstacle():
        return ""
    if plan.dtype is not dtype or plan.device != device:
        return ""
    if edited_in_graph(*plan.watch.watched()):
        return ""
    return hashlib.sha256(repr(module).encode()).hexdigest()[:16]


@constant_in_graphs
def _training_text(module: DropIn, key: str, dtype: torch.dtype, device: torch.device) -> str:
    """The piece `key` of `module` in train mode, for `TracedPlan`; empty where timm's own path must be traced."""
    plan = module._mnv4_training_plan(key)
    return "" if plan.obstacle_of(dtype, device) else describe(plan)


def _input_obstacle(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return f"the input is a {type(x).__name__}"
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions"
    if x.dtype not in leaves.DTYPES:
        return f"the input is {dtype_name(x.dtype)}"
    if x.device.type not in leaves.DEVICES:
        return f"the input is on {x.device}; the fused ops run on cpu and cuda"
    return ""
