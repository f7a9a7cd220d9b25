"""Tolerances that are earned: an error may be twice what the plain computation makes, and no more."""

from __future__ import annotations

from typing import Any

import torch


def error_budget(baseline: torch.Tensor, exact: torch.Tensor) -> float:
    """2 * (baseline's largest error + half a unit in the last place of the largest exact value).

    Args:
        baseline: the same computation in plain torch, in the dtype under test.
        exact: the same computation in float64.
    """
    error, scale = _largest(baseline, exact)
    return 2 * (error + _half_unit(baseline) * scale)


def assert_within_budget(actual: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor) -> None:
    """`actual` is as near to `exact` as `baseline` earns, over all and on each border of a map.

    The borders (first and last row and column of the last two dimensions of a 4-dimensional
    result) are compared on their own, because an edge computed wrongly can hide under the
    interior's larger values. A border's budget counts the baseline's error there or, if that
    is larger, its relative error over all: a few elements can be right by luck.

    Where `exact` is NaN or infinite, `actual` must be the same; elsewhere it must be finite,
    unless the exact value overflows the dtype.

    Args:
        actual: what is under test.
        baseline: the same computation in plain torch, `actual`'s dtype and shape.
        exact: the same computation in float64.

    Raises:
        AssertionError: naming the region, the error, the budget and the worst position.
        ValueError: the three don't belong together.
    """
    if not actual.shape == baseline.shape == exact.shape:
        shapes = ", ".join(str(tuple(value.shape)) for value in (actual, baseline, exact))
        raise ValueError(f"`actual`, `baseline` and `exact` must have one shape, got {shapes}")
    if actual.dtype != baseline.dtype or exact.dtype != torch.float64:
        raise ValueError(
            f"`baseline` must have `actual`'s dtype and `exact` float64, got {actual.dtype}, {baseline.dtype}, "
            f"{exact.dtype}"
        )
    # rounding to the dtype turns what overflows it into an infinity
    exact = torch.where(exact.to(actual.dtype).isinf(), exact.to(actual.dtype).double(), exact)
    _assert_same_specials(actual, exact)
    if exact.numel() == 0:
        return
    error, scale = _largest(baseline, exact)
    relative = error / scale if scale else 0.0
    for region, index in _regions(actual.dim()):
        _assert_region(region, actual[index], baseline[index], exact[index], relative)


def _regions(rank: int) -> list[tuple[str, tuple[Any, ...]]]:
    regions: list[tuple[str, tuple[Any, ...]]] = [("everywhere", (...,))]
    if rank != 4:
        return regions
    return [
        *regions,
        ("in the first row", (..., slice(0, 1), slice(None))),
        ("in the last row", (..., slice(-1, None), slice(None))),
        ("in the first column", (..., slice(0, 1))),
        ("in the last column", (..., slice(-1, None))),
    ]


def _assert_region(
    region: str, actual: torch.Tensor, baseline: torch.Tensor, exact: torch.Tensor, relative: float
) -> None:
    error, scale = _largest(baseline, exact)
    budget = 2 * (max(error, relative * scale) + _half_unit(actual) * scale)
    errors = _errors(actual, exact)
    error = errors.max().item()
    if error <= budget:
        return
    worst = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    raise AssertionError(
        f"{region}: error {error:.3g} is above the budget of {budget:.3g} at {worst}: "
        f"got {actual[worst].item()!r}, expected {exact[worst].item()!r}, baseline {baseline[worst].item()!r}; "
        f"{int((errors > budget).sum())} of {errors.numel()} elements are outside"
    )


def _half_unit(value: torch.Tensor) -> float:
    return torch.finfo(value.dtype).eps / 2


def _largest(value: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The largest error of `value` and the largest magnitude of `exact`, where that is finite."""
    finite = torch.where(exact.isfinite(), exact, 0.0)
    # a baseline that rounds between its steps may overflow where the exact result doesn't: that earns nothing
    return _errors(value, exact).nan_to_num(posinf=0.0).max().item(), finite.abs().max().item()


def _errors(value: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return torch.where(exact.isfinite(), value.double() - exact, 0.0).abs()


def _assert_same_specials(actual: torch.Tensor, exact: torch.Tensor) -> None:
    wrong = torch.where(exact.isfinite(), ~actual.isfinite(), _differ(actual.double(), exact))
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite where they should not be, or are not "
            f"where they should; first at {first}: got {actual[first].item()!r}, expected {exact[first].item()!r}"
        )


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())
