"""The calls of timm's models as calls of our ops, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from shapes import CallShape, kept_calls

from mnv4_kernels.testing import Case
from mnv4_kernels.testing.cases import conv, dwconv, head, kv_downsample, mqa, pwconv

#: Of timm's models.
CLASSES = 1000

#: timm's class -> our name
ACTS = {"": "none", "ReLU": "relu", "GELU": "gelu"}


def op_cases(models: Iterable[str], batch: int) -> list[Case]:
    """Distinct calls that `models` make, in order of appearance.

    Args:
        models: names of files in benchmarks/calls.
        batch: images.
    """
    found = {str(case): case for model in models for case in _cases(kept_calls(model), batch)}
    return list(found.values())


def heaviest_cases(model: str, batch: int) -> list[Case]:
    """Of each op of `model` the call with most multiplications."""
    heaviest: dict[str, tuple[int, Case]] = {}
    for shape, case in zip((calls := kept_calls(model)), _cases_of_each(calls, batch), strict=True):
        if case is not None and multiplications(shape) > heaviest.get(case.op, (0,))[0]:
            heaviest[case.op] = (multiplications(shape), case)
    return [case for _, case in heaviest.values()]


def multiplications(shape: CallShape) -> int:
    """Of one image's call."""
    height, width = shape.size
    if shape.heads:
        return shape.heads * height * width * (shape.channels + shape.outputs)
    inputs = 1 if shape.op in ("dwconv_bn_act", "kv_downsample") else shape.channels
    positions = math.prod(_output_size(shape))
    return positions * shape.outputs * inputs * math.prod(shape.kernel)


def _cases(calls: list[CallShape], batch: int) -> Iterator[Case]:
    return (case for case in _cases_of_each(calls, batch) if case is not None)


def _cases_of_each(calls: list[CallShape], batch: int) -> Iterator[Case | None]:
    """A case a call; None for the projection after a `kv_downsample`, which is in that op."""
    before: CallShape | None = None
    after = {id(first): second for first, second in pairwise(calls)}
    for shape in calls:
        yield None if before and before.op == "kv_downsample" else _case(shape, before, after.get(id(shape)), batch)
        before = shape


def _case(shape: CallShape, before: CallShape | None, after: CallShape | None, batch: int) -> Case:
    top, left = shape.padding
    geometry = {"kernel": shape.kernel, "stride": shape.stride[0], "padding": (top, top, left, left), "batch": batch}
    act = ACTS[shape.act]
    if shape.op == "dwconv_bn_act":
        return dwconv(shape.channels, shape.size, act=act, **geometry)
    if shape.op == "conv_bn_act":
        return conv(shape.channels, shape.outputs, shape.size, act=act, **geometry)
    if shape.op == "kv_downsample":
        assert after is not None, "keys and values are projected"
        return kv_downsample(shape.channels, after.outputs, after.outputs, shape.size, **geometry)
    if shape.op == "mqa":
        queries, keys = shape.size
        side = math.isqrt(queries)
        return mqa(shape.heads, shape.channels, shape.outputs, keys, (side, queries // side), batch=batch)
    # a map of one pixel has been pooled: this is the head
    if shape.size == (1, 1) and before is not None:
        return head(shape.channels, shape.outputs, CLASSES, _output_size(before), act=act, batch=batch)
    return pwconv(shape.channels, shape.outputs, shape.size, act=act, batch=batch)


def _output_size(shape: CallShape) -> tuple[int, int]:
    height, width = (
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(shape.size, shape.padding, shape.kernel, shape.stride, strict=True)
    )
    return height, width
