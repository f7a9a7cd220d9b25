"""Checks that the engine's tests share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import Call, double_of, forward, images, tensors_of
from torch import nn

import mnv4_kernels as mk
from mnv4_kernels.backends import native

needs_engine = pytest.mark.skipif(not native.available(), reason="the engine needs the C++ library")


def batches(*shape: int, count: int = 3) -> list[torch.Tensor]:
    """Several random inputs of one shape."""
    return [images(*shape, seed=10 + seed) for seed in range(count)]


def error_of(results: Any, exact: Any) -> list[float]:
    """The norm of each result's error relative to the norm of the exact one."""
    norm = torch.linalg.vector_norm
    pairs = zip(tensors_of(results), tensors_of(exact), strict=True)
    return [(norm(mine.double() - true) / norm(true)).item() for mine, true in pairs]


def assert_twice_as_exact_as_eager(
    fast: nn.Module,
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    call: Call = forward,
) -> None:
    """Root-mean-square over `inputs`, `fast`'s error against float64 is at most twice eager's in `dtype`.

    One image is a draw: random weights let some of them amplify any rounding. Several
    together are a fair comparison, without any slack beside the factor of two.

    Args:
        fast: an optimized `model`.
        model: timm's, float32.
        inputs: images; rounded to `dtype` before anyone sees them.
    """
    eager, exact = copy.deepcopy(model).to(dtype), double_of(model)
    squares: list[list[tuple[float, float]]] = []
    with torch.no_grad():
        for x in inputs:
            x = x.to(dtype)
            actual, expected, true = call(fast, x), call(eager, x), call(exact, x.double())
            shapes = [(tuple(y.shape), y.dtype) for y in tensors_of(expected)]
            assert [(tuple(y.shape), y.dtype) for y in tensors_of(actual)] == shapes
            squares.append(
                [(a * a, b * b) for a, b in zip(error_of(actual, true), error_of(expected, true), strict=True)]
            )
    for output in zip(*squares, strict=True):
        mine, theirs = (sum(values) ** 0.5 for values in zip(*output, strict=True))
        assert mine <= 2 * theirs, f"error {mine:.3g}, eager's {theirs:.3g}"


def assert_optimized_is_as_exact(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    call: Call = forward,
) -> mk.OptimizedNetwork:
    """Optimizes the whole of `model`, checks its results, and returns the optimized network."""
    fast = mk.optimize(model, dtype, strict=True)
    assert_twice_as_exact_as_eager(fast, model, inputs, dtype, call)
    return fast
