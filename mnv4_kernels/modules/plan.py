"""A plan: a block's eval-mode forward as a short list of ready calls, and its exact backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..backends.torch_internals import below_autograd
from ..environment import Switches
from . import gpu, leaves
from .body import Body, dtype_of, formula_of
from .steps import Own, Run, chained
from .watch import Watch


class Plan:
    """A body made ready: folded, packed, and watched for changes."""

    __slots__ = ("_call", "_differentiable", "body", "device", "dtype", "obstacle", "switches", "watch")

    def __init__(self, body: Body) -> None:
        self.body = body
        self.watch = Watch(body.owner, body.bypassed, body.settings)
        on_gpu = _on_gpu(body)
        self.switches = Switches(gpu.ops_of(body) if on_gpu else (op for step in body.fused for op in step.ops))
        self.obstacle = _obstacle(body) or (gpu.obstacle_of(body) if on_gpu else "")
        self.device = None if self.obstacle else next(iter(_devices(body)))
        self.dtype = None if self.obstacle else dtype_of(body.fused)
        # a module of timm's, called again in the backward, might by then be in another mode
        self._differentiable = not body.own
        self._call: Run | None = None

    @property
    def call(self) -> Run:
        """The block's result, under whatever guards the caller has; only where there is no `obstacle`.

        Folded and packed at the first use: a plan that is looked at may never run.
        """
        if self._call is None:
            self._call = ready(self.body)
        return self._call

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result, without an autograd graph; only where there is no `obstacle`.

        The ops' Python autograd kernels are skipped: there is nothing for them to record.
        """
        if not self._differentiable:
            return self.call(x)
        with below_autograd():
            return self.call(x)

    def run_differentiably(self, x: torch.Tensor) -> torch.Tensor:
        """The same with a backward that recomputes the block by timm's formula."""
        tensors = [tensor for step in self.body.fused for tensor in step.tensors()]
        return _Recomputed.apply(self, x, *tensors)

    def grad_obstacle(self) -> str:
        """Why a call that needs gradients takes timm's path; empty: it need not."""
        if not self._differentiable:
            return "gradients through a block with modules of timm's"
        if self.watch.backward_hooked():
            return "a backward hook on an inner module, or a global one"
        return ""


def ready(body: Body) -> Run:
    """One function for a body: its steps folded and packed, called in order, and the skip."""
    # plans are made in whatever mode the first call is in, and outlive it
    with torch.inference_mode(False), torch.no_grad():
        return gpu.in_order(body) if _on_gpu(body) else in_order(body)


def in_order(body: Body) -> Run:
    """`ready` in the mode of the caller."""
    calls = [step.module if isinstance(step, Own) else step.prepare() for step in body.steps]
    last = body.steps[-1]
    return chained(calls, body.residual, not isinstance(last, Own) and last.takes_residual)


def _obstacle(body: Body) -> str:
    if not body.fused:
        return "; ".join(dict.fromkeys(step.reason for step in body.own)) or "nothing that an op computes"
    reasons = [reason for step in body.fused for module in step.modules() for reason in leaves.tensor_reasons(module)]
    if not reasons and dtype_of(body.fused) is None:
        reasons.append("convolutions of different dtypes")
    if not reasons and len(_devices(body)) > 1:
        reasons.append(f"parameters on {' and '.join(sorted(map(str, _devices(body))))}")
    return "; ".join(dict.fromkeys(reasons))


def _tensors(body: Body) -> list[torch.Tensor]:
    return [tensor for step in body.fused for tensor in step.tensors() if tensor is not None]


def _devices(body: Body) -> set[torch.device]:
    return {tensor.device for tensor in _tensors(body)}


def _on_gpu(body: Body) -> bool:
    return any(map(leaves.on_gpu, _tensors(body)))


class _Recomputed(torch.autograd.Function):
    """A plan's forward; its backward differentiates timm's formula, recomputed from the inputs."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x, *tensors)
        return plan.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            value.detach().requires_grad_() if need else value
            for value, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            y = formula_of(ctx.plan.body, inputs[0], inputs[1:])
            wanted = [value for value, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad))
        return (None, *(next(found) if need else None for need in needed))
