"""`explain`: which op and kernel each block runs for an input, and why not a better one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from .. import tables
from ..backends import native
from ..modules import HEAD, PRE_LOGITS, STEM, DropIn, MobileNetV3Forward, Plan, TrainingPlan, gpu, leaves
from ..modules.head import Head
from .rules import rule_of

TIMM = "timm's own path"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How one piece of the model runs, or the network as a whole."""

    name: str
    cls: str
    #: shape of what it is given
    shape: tuple[int, ...]
    #: "piece: op", empty where timm's own path runs; of a network whether it is one program
    steps: tuple[str, ...]
    #: who computes the ops
    kernel: str
    #: why timm's own path runs, or what keeps a better kernel from running; empty: nothing does
    reason: str


@dataclasses.dataclass(frozen=True)
class ExplainReport:
    """One row a block, in the order in which they ran; `print` is a table."""

    model: str
    rows: tuple[Explanation, ...]

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                row.cls,
                "x".join(map(str, row.shape)),
                row.kernel,
                ", ".join(row.steps) or TIMM,
                row.reason,
            )
            for row in self.rows
        ]
        columns = ("module", "class", "input", "kernel", "ops", "why not better")
        return tables.render(f"mnv4_kernels.explain({self.model})", columns, rows)


def explain(model: nn.Module, x: torch.Tensor) -> ExplainReport:
    """Runs `model` on `x` and says of each block which op and kernel it runs, or why timm's own path does.

    In eval mode on a CPU the row of a patched network says whether it runs as one program of the engine, which then
    computes what the rows of its blocks name, or why each block runs by itself: with gradients enabled, for one. So ask
    under `torch.no_grad()` if that is how the model is called. The model runs once in train mode, twice in eval mode.

    Args:
        model: any module, patched or not, in the mode that is asked about.
        x: what the model is given.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    rows: list[Explanation] = []
    networks = [module for module in names if isinstance(module, MobileNetV3Forward) and not module.training]
    # first by themselves: a network with hooks on its blocks would run block by block
    if networks:
        _run_with(model, x, {network: _program_recorder(rows, names[network]) for network in networks})
    _run_with(model, x, {module: _recorder(rows, names[module]) for module in _blocks(model)})
    rule = rule_of(model)
    return ExplainReport((rule.replaces if rule else type(model)).__name__, tuple(rows))


def _run_with(model: nn.Module, x: torch.Tensor, hooks: dict[nn.Module, Any]) -> None:
    """Runs `model` on `x` with a forward pre-hook on each of these modules."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model if a rule knows it, and the outermost modules in it that a rule knows."""
    found = [model] if rule_of(model) is not None else []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if rule_of(child) is None:
                walk(child)
            else:
                found.append(child)

    walk(model)
    return found


def _program_recorder(rows: list[Explanation], name: str) -> Any:
    def hook(network: MobileNetV3Forward, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = _input(arguments, keywords)
        if isinstance(x, torch.Tensor) and leaves.on_gpu(x):
            # the engine is for CPUs, and a GPU runs block by block
            return
        obstacle = network._mnv4_program_obstacle(x)
        kernel, missing = ("", obstacle) if obstacle else _library()
        ops = "block by block" if obstacle else "one program of the engine"
        rows.append(Explanation(name or "(model)", network._mnv4_base.__name__, _shape(x), (ops,), kernel, missing))

    return hook


def _input(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return arguments[0] if arguments else next(iter(keywords.values()), None)


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else ()


def _recorder(rows: list[Explanation], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = _input(arguments, keywords)
        rule = rule_of(module)
        assert rule is not None
        for piece in rule.pieces:
            title = f"{name}.{piece}".strip(".") or "(model)"
            rows.append(_explain(module, piece, title, rule.replaces.__name__, x))

    return hook


def _explain(module: nn.Module, piece: str, title: str, cls: str, x: Any) -> Explanation:
    shape = _shape(x)
    if piece in (HEAD, PRE_LOGITS):
        # what the head is given is not known yet
        shape = ()
    if not isinstance(module, DropIn):
        return Explanation(title, cls, shape, (), "torch", "not patched")
    plan, obstacle = module._mnv4_decide(x, piece)
    if plan is None or obstacle:
        inner = " (drop-ins inside decide for themselves)" if piece not in (STEM, HEAD, PRE_LOGITS) else ""
        return Explanation(title, cls, shape, (), "torch", f"{obstacle}{inner}")
    kernel, missing, steps = _kernel(plan, x)
    kept = "; ".join(f"{step.name} by timm's module: {step.reason}" for step in plan.body.own)
    return Explanation(title, cls, shape, steps, kernel, "; ".join(filter(None, (kept, missing))))


def _kernel(plan: Plan | TrainingPlan, x: torch.Tensor) -> tuple[str, str, tuple[str, ...]]:
    """(who computes the ops, what keeps a better kernel from running, "piece: op" of each)."""
    if isinstance(plan, TrainingPlan):
        return (("Triton", "") if leaves.on_gpu(x) else _library()) + (plan.titles(),)
    body = plan.body
    if leaves.on_gpu(x) and not isinstance(body.fused[0], Head):
        titles, decisions = gpu.explain(body, x)
        return "Triton", "; ".join(line.strip() for text in decisions for line in text.splitlines()), tuple(titles)
    steps = tuple(f"{step.name}: {op}" if step.name else op for step in body.fused for op in dict.fromkeys(step.ops))
    if leaves.on_gpu(x):
        return "Triton", "", steps
    return *_library(), steps


def _library() -> tuple[str, str]:
    if not native.available():
        return "torch reference", "; ".join(native.reasons())
    library = native.module()
    active, detected = library.active_tier(), library.detected_tier()
    return f"C++ {active}", "" if active == detected else f"the tier is capped, this processor has {detected}"
