"""`verify`: is each block, and the whole, as exact as timm's? Judged against float64, never by a fixed tolerance."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import tables
from ..modules import DropIn, timm_stem
from ..ops.support import dtype_name
from .instances import unpatch

WHOLE = "(whole model)"


@dataclasses.dataclass(frozen=True)
class Check:
    """Errors of one module's result against timm's in float64, and timm's own in the dtype under test."""

    name: str
    cls: str
    #: largest error, relative to the largest exact value; the same of timm's own
    largest: float
    timm_largest: float
    #: norm of the error, relative to the norm of the exact result; the same of timm's own
    norm: float
    timm_norm: float
    #: what is over its budget, empty where nothing is
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """Stem, blocks, head, and the whole; `print` is a table."""

    model: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """The checks that are over their budget."""
        return [check for check in self.checks if check.failure]

    def __str__(self) -> str:
        rows = [
            (
                check.name,
                *(f"{error:.2e}" for error in (check.largest, check.timm_largest, check.norm, check.timm_norm)),
                "FAILED" if check.failure else "ok",
            )
            for check in self.checks
        ]
        columns = ("module", "largest error", "timm's", "error norm", "timm's", "")
        notes = ("Errors are relative to timm's result in float64, the norms to its norm.",)
        return tables.render(f"mnv4_kernels.verify({self.model})", columns, rows, notes)


class VerificationError(AssertionError):
    """A block or the whole is less exact than it must be; the message is the report."""


def verify(model: nn.Module, x: torch.Tensor) -> VerifyReport:
    """Compares a patched model with unpatched copies of it, block by block and as a whole.

    Each block is given the input that it has in timm's own run, so that one block's error
    is not another's. The exact result is timm's in float64. The largest error of a block
    may be twice what timm's own is in the same dtype, plus a rounding band: half a unit in
    the last place times the root of the number of convolutions, each of which rounds once.
    So may the norm of the error, over all and over each border of the map, and the norm
    of the whole model's error.

    Args:
        model: patched, in eval mode; it is not changed, and its hooks don't run.
        x: images [N, C, H, W] in the model's dtype, N at least 1.

    Returns:
        The errors found.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `x` is no tensor of the model's dtype.
        ValueError: `model` is not patched, or is in train mode, or `x` holds nothing, is not [N, C, H, W] or is on
            another device than the model.
        VerificationError: (an AssertionError) a result is off by more than its budget.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, DropIn) for module in model.modules()):
        raise ValueError("`model` must be patched: call mnv4_kernels.patch(model) first")
    if model.training:
        raise ValueError("`model` must be in eval mode, got train mode: call model.eval() first")
    _check_images(model, x)
    # the copies' hooks are taken off: a user's hook would run three times, and may keep a block from being fused
    patched = _bare(copy.deepcopy(model))
    timm = unpatch(copy.deepcopy(patched))
    exact = copy.deepcopy(timm).double()
    with torch.no_grad():
        checks = tuple(_checks(patched, timm, exact, x))
    report = VerifyReport(type(timm).__name__, checks)
    if report.failures:
        details = "\n".join(f"{check.name}: {check.failure}" for check in report.failures)
        raise VerificationError(f"{report}\n{details}")
    return report


def _check_images(model: nn.Module, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`x` must be a tensor [N, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"`x` must have shape [N, C, H, W], got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"`x` must hold at least one image, got shape {tuple(x.shape)}")
    convs = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    dtypes, devices = {weight.dtype for weight in convs}, {weight.device for weight in convs}
    if x.dtype not in dtypes:
        expected = " or ".join(sorted(map(dtype_name, dtypes)))
        raise TypeError(f"`x` must have the model's dtype, {expected}, got {dtype_name(x.dtype)}")
    if x.device not in devices:
        expected = " or ".join(sorted(map(str, devices)))
        raise ValueError(f"`x` must be on the model's device, {expected}, got {x.device}")


def _checks(patched: Any, timm: Any, exact: Any, x: torch.Tensor) -> Iterator[Check]:
    mine, theirs, true = (dict(model.named_modules()) for model in (patched, timm, exact))
    if isinstance(patched, DropIn) and "conv_stem" in mine:
        stem: Any = patched._mnv4_stem
        calls = (stem, partial(timm_stem, timm), partial(timm_stem, exact))
        yield _check("stem", type(timm).__name__, calls, x, 1)
    for name, value in _inputs_of_blocks(timm, list(_outermost(patched)), x).items():
        modules = (mine[name], theirs[name], true[name])
        # the drop-ins' fast path is NHWC, as inside a patched network; formats change no value
        given = value.contiguous(memory_format=torch.channels_last)
        yield _check(name, type(theirs[name]).__name__, modules, given, _roundings(mine[name]))
    if isinstance(patched, DropIn) and "classifier" in mine:
        networks: tuple[Any, ...] = (patched, timm, exact)
        heads = [network.forward_head for network in networks]
        given = timm.forward_features(x).contiguous(memory_format=torch.channels_last)
        yield _check("head", type(timm).__name__, heads, given, 2)
    yield _check(WHOLE, type(timm).__name__, (patched, timm, exact), x, _roundings(patched))


def _roundings(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d) for part in module.modules())


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the drop-ins that are in no other, but for the network itself."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, DropIn):
            yield path
        else:
            yield from _outermost(child, f"{path}.")


def _inputs_of_blocks(timm: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    modules = dict(timm.named_modules())

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if name not in inputs and arguments and isinstance(arguments[0], torch.Tensor):
                # what comes after may work in place on it
                inputs[name] = arguments[0].clone()

        return hook

    handles = [modules[name].register_forward_pre_hook(record(name)) for name in names]
    try:
        timm(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _check(name: str, cls: str, calls: Sequence[Callable[..., Any]], x: torch.Tensor, roundings: int) -> Check:
    mine, timm, exact = calls
    results = zip(_tensors(mine(x.clone())), _tensors(timm(x.clone())), _tensors(exact(x.double())), strict=True)
    errors = (0.0, 0.0, 0.0, 0.0)
    failures: list[str] = []
    for actual, plain, true in results:
        found = (
            _largest(actual, true) / _size(true),
            _largest(plain, true) / _size(true),
            _norm(actual - true) / max(_norm(true), _TINY),
            _norm(plain - true) / max(_norm(true), _TINY),
        )
        errors = tuple(map(max, errors, found))  # type: ignore[assignment]
        failures += _failures(actual, plain, true, math.sqrt(roundings), name == WHOLE)
    return Check(name, cls, *errors, "; ".join(failures))


_TINY = torch.finfo(torch.float64).tiny

_REGIONS: dict[str, tuple[Any, ...]] = {
    "everywhere": (...,),
    "in the first row": (..., slice(0, 1), slice(None)),
    "in the last row": (..., slice(-1, None), slice(None)),
    "in the first column": (..., slice(0, 1)),
    "in the last column": (..., slice(-1, None)),
}


def _failures(
    actual: torch.Tensor, plain: torch.Tensor, true: torch.Tensor, roundings: float, whole: bool
) -> list[str]:
    if actual.shape != plain.shape or actual.dtype != plain.dtype:
        return [f"got {actual.dtype} {tuple(actual.shape)}, timm gives {plain.dtype} {tuple(plain.shape)}"]
    if not torch.equal(actual.isfinite(), plain.isfinite()):
        return ["NaNs or infinities are not where timm has them"]
    unit = roundings * torch.finfo(plain.dtype).eps / 2
    found = []
    budget = 2 * (_largest(plain, true) + unit * _size(true))
    if not whole and _largest(actual, true) > budget:
        found.append(f"largest error {_largest(actual, true):.3g} is above the budget of {budget:.3g}")
    for region, index in _REGIONS.items() if actual.dim() == 4 else [("everywhere", (...,))]:
        error, earned = _norm(actual[index] - true[index]), _norm(plain[index] - true[index])
        budget = 2 * (earned + unit * _norm(true[index]))
        if error > budget:
            found.append(f"{region}: the error's norm {error:.3g} is above the budget of {budget:.3g}")
    return found


def _largest(value: torch.Tensor, true: torch.Tensor) -> float:
    return (value.double() - true).nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()


def _size(true: torch.Tensor) -> float:
    return max(true.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item(), _TINY)


def _norm(value: torch.Tensor) -> float:
    return torch.linalg.vector_norm(value.double().nan_to_num(posinf=0.0, neginf=0.0)).item()


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result for tensor in _tensors(item)]


def _bare(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return model
