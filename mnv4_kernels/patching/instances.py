"""`patch`, `unpatch`, `patched`: a change of instances' classes, and back."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from ..modules import Body, DropIn, leave_room, leaves, make_room
from .report import LEFT_ALONE, PARTLY, REPLACED, PatchReport, Row
from .rules import RULES, Rule, rule_of

Model = TypeVar("Model", bound=nn.Module)

TRAIN_NOTE = (
    "The model is in train mode, where the head's pool and classifier run timm's modules, its convolution and what "
    "the table lists run their training ops. After `model.eval()` the table holds as it is."
)


class PatchError(RuntimeError):
    """`patch(..., strict=True)` found something that would keep timm's path; nothing was changed."""


def patch(model: nn.Module, strict: bool = False) -> PatchReport:
    """Gives each block of timm's MobileNet-V4 in `model` the forward that runs the fused ops.

    In place and of this instance only: each block's class becomes a subclass of timm's
    with the same parameters, submodules, hooks and names. In eval mode the ops run with
    BatchNorm and layer scale folded in; a change of the parameters is seen at the next
    call, but for edits through `.data` or numpy (`refresh`). In train mode the training ops run
    on the live parameters; the head's pool and classifier are timm's. Patching a patched model
    changes nothing and reports again.

    Args:
        model: any module; blocks are found wherever they are in it.
        strict: raise before changing anything if any module would keep timm's path.

    Returns:
        What was replaced, and what was left alone and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ImportError: timm is not installed.
        PatchError: `strict`, and something would keep timm's path.

    Warns:
        UserWarning: nothing in the model could be replaced.
    """
    report = apply(model, strict)
    if not report.replaced and not report.partly:
        warnings.warn(f"mnv4_kernels.patch: nothing to replace in {report.model}", stacklevel=2)
    return report


def apply(model: nn.Module, strict: bool = False) -> PatchReport:
    """`patch` without the warning."""
    _check(model)
    rows, changes, notes = _decide(model)
    report = PatchReport(_class_name(model), tuple(rows), tuple(notes))
    if strict:
        _raise_if_anything_stays(report)
    _change(changes)
    return report


def unpatch(model: Model) -> Model:
    """Takes every patch back; returns `model`, the very instance, as it was. Harmless on an unpatched one.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    _check(model)
    for module in model.modules():
        if isinstance(module, DropIn):
            _restore(module, _unpatched(type(module)))
    return model


@contextlib.contextmanager
def patched(model: nn.Module, strict: bool = False) -> Iterator[PatchReport]:
    """`patch` for the length of a `with` block; what was patched before stays so after it."""
    _check(model)
    before = {id(module) for module in model.modules() if isinstance(module, DropIn)}
    report = patch(model, strict)
    try:
        yield report
    finally:
        for module in model.modules():
            if isinstance(module, DropIn) and id(module) not in before:
                _restore(module, _unpatched(type(module)))


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")


def _change(changes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, cls in changes:
            done.append((module, type(module)))
            module.__class__ = cls
            make_room(module)
    except BaseException:
        for module, before in done:
            _restore(module, before)
        raise


def _restore(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    leave_room(module)


#: a class with a drop-in in it -> the same with timm's class
_UNPATCHED: dict[type[nn.Module], type[nn.Module]] = {}


def _unpatched(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with timm's class in a drop-in's place: what was put before it since, as fully_shard does, stays."""
    own: type[nn.Module] | None = vars(cls).get("_mnv4_base")
    if own is not None or not issubclass(cls, DropIn):
        return own or cls
    if cls not in _UNPATCHED:
        below = next(base for base in cls.__mro__ if "_mnv4_base" in vars(base))
        members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        name = cls.__name__.replace(below.__name__, cls._mnv4_base.__name__)
        _UNPATCHED[cls] = type(name, tuple(map(_unpatched, cls.__bases__)), members)
    return _UNPATCHED[cls]


def _decide(
    model: nn.Module,
) -> tuple[list[Row], list[tuple[nn.Module, type[nn.Module]]], list[str]]:
    """(a row for each module, what to change, notes on the model's state); changes nothing."""
    names = {module: name for name, module in model.named_modules()}
    rows: dict[nn.Module, Row] = {}
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    accounted: set[nn.Module] = set()
    for module, name in names.items():
        rule = rule_of(module)
        if rule is None:
            near = _subclass_row(module, name)
            if near is not None:
                rows[module] = near
            continue
        row, bodies = _row(module, name, rule, names)
        rows[module] = row
        if row.status == LEFT_ALONE:
            continue
        if not isinstance(module, DropIn):
            changes.append((module, rule.dropin))
        for body in bodies:
            accounted.update(body.bypassed if body.fused else ())
    for module, name in names.items():
        leaf = next(module.children(), None) is None
        if leaf and module not in accounted and module not in rows:
            rows[module] = _leaf_row(module, name, list(rows.values()))
    anything = any(row.status != LEFT_ALONE for row in rows.values())
    notes = [TRAIN_NOTE] if model.training and anything else []
    states = Counter(reason for module in accounted for reason in leaves.tensor_reasons(module))
    notes += [f"For now {count} modules take timm's own path: {reason}." for reason, count in states.items()]
    return [rows[module] for module in names if module in rows], changes, notes


def _row(module: nn.Module, name: str, rule: Rule, names: dict[nn.Module, str]) -> tuple[Row, list[Body]]:
    cls = rule.replaces.__name__
    own_methods = [method for method in rule.methods if method in vars(module)]
    if own_methods:
        reason = f"`{own_methods[0]}` was replaced on the instance"
        return Row(name, cls, LEFT_ALONE, kept=(("", reason),)), []
    try:
        bodies = [rule.dropin._mnv4_body(module, piece) for piece in rule.pieces]  # type: ignore[arg-type]
    except (AttributeError, KeyError) as error:
        reason = f"not built as timm builds a {cls}: {error} is missing"
        return Row(name, cls, LEFT_ALONE, kept=(("", reason),)), []
    fused = tuple(
        f"{step.name}: {op}" if step.name else op for body in bodies for step in body.fused for op in step.ops
    )
    own = [step for body in bodies for step in body.own]
    kept = tuple((_relative(names.get(step.module, step.name), name), step.reason) for step in own)
    status = LEFT_ALONE if not fused else PARTLY if kept else REPLACED
    return Row(name, cls, status, fused, kept), bodies


def _subclass_row(module: nn.Module, name: str) -> Row | None:
    """The row of a module that is nearly one of those that rules know; None for any other."""
    base = next((cls for cls in RULES if isinstance(module, cls)), None)
    if base is None:
        return None
    reason = f"a subclass of timm's {base.__name__} may compute something else"
    if any(cls.__name__ == "FSDPModule" for cls in type(module).__bases__):
        reason = "it was sharded first: call mnv4_kernels.patch before fully_shard"
    return Row(name, type(module).__name__, LEFT_ALONE, kept=(("", reason),))


def _leaf_row(module: nn.Module, name: str, blocks: list[Row]) -> Row:
    cls = type(module).__name__
    for block in blocks:
        for kept, reason in block.kept:
            inner = f"{block.name}.{kept}" if block.name and kept else block.name or kept
            if inner == name:
                return Row(name, cls, LEFT_ALONE, kept=(("", reason),))
    idle = " (does nothing)" if type(module) is nn.Identity else ""
    return Row(name, cls, LEFT_ALONE, kept=(("", f"not in a block that a rule knows{idle}"),))


def _relative(name: str, owner: str) -> str:
    return name.removeprefix(f"{owner}.") if owner else name


def _class_name(model: nn.Module) -> str:
    return (model._mnv4_base if isinstance(model, DropIn) else type(model)).__name__


def _raise_if_anything_stays(report: PatchReport) -> None:
    reasons = [f"{row.name or '(model)'} ({row.cls}): {row.reason}" for row in (*report.partly, *report.left_alone)]
    reasons += report.notes
    if not report.rows:
        reasons.append(f"{report.model} has no block that a rule knows")
    if reasons:
        shown = "\n  ".join(reasons[:20])
        more = f"\n  and {len(reasons) - 20} more" if len(reasons) > 20 else ""
        raise PatchError(f"patch(strict=True) left the model as it was, these would keep timm's path:\n  {shown}{more}")
