"""`uib`'s plans against the reference, in the interpreter: every way to fuse, whole batches and parts."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_earned, nhwc

from mnv4_kernels.ops.gpu import gate
from mnv4_kernels.ops.gpu.traffic import Ceilings
from mnv4_kernels.ops.uib import triton_expand_project as products
from mnv4_kernels.ops.uib.contract import fake
from mnv4_kernels.ops.uib.reference import reference
from mnv4_kernels.ops.uib.triton_uib import build, shape_of, uib

SHAPES = {"ExtraDW": (3, 5), "IB": (0, 3), "ConvNeXt-like": (5, 0), "FFN": (0, 0)}


def _depthwise(channels: int, kernel: int, stride: int, dtype: torch.dtype) -> tuple[object, ...]:
    geometry = ([stride, stride], [kernel // 2] * 4, [1, 1])
    if not kernel:
        return (None, None, None, *geometry)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype) / kernel
    return (weight, torch.rand(channels) + 0.5, torch.randn(channels), *geometry)


def _arguments(
    x: torch.Tensor, kernels: tuple[int, int], stride: int = 1, hidden: int = 32, outputs: int | None = None
) -> tuple[object, ...]:
    channels = x.shape[1]
    outputs = outputs or channels
    residual = stride == 1 and outputs == channels
    start = _depthwise(channels, kernels[0], 1 if kernels[1] else stride, x.dtype)
    mid = _depthwise(hidden, kernels[1], stride, x.dtype)
    expand = ((torch.randn(hidden, channels, 1, 1) / 4).to(x.dtype), torch.rand(hidden) + 0.5, torch.randn(hidden))
    project = ((torch.randn(outputs, hidden, 1, 1) / 5).to(x.dtype), torch.rand(outputs) + 0.5, torch.randn(outputs))
    return (*start, *expand, *mid, "relu", *project, torch.randn(outputs), residual)


def _judge(actual: torch.Tensor, x: torch.Tensor, arguments: tuple[object, ...]) -> None:
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    assert_earned(actual, reference(x.double(), *wide), reference(x, *arguments), fake(x, *arguments), terms=150)


def _plans(x: torch.Tensor, arguments: tuple[object, ...], ceilings: Ceilings | None = None) -> list[gate.Plan]:
    chosen = (arguments[0], arguments[3], arguments[6], arguments[9], arguments[12], arguments[16], arguments[-1])
    return gate.uib_plans(shape_of(x, *chosen), x.element_size(), ceilings)


@pytest.mark.parametrize(
    ("name", "stride"), [*((name, 1) for name in SHAPES), ("ExtraDW", 2), ("IB", 2), ("ConvNeXt-like", 2)]
)
def test_every_shape_of_the_block_matches(name: str, stride: int) -> None:
    x = nhwc(2, 24, 5, 7)
    arguments = _arguments(x, SHAPES[name], stride)
    _judge(uib(x, *arguments), x, arguments)


@pytest.mark.parametrize("name", SHAPES)
def test_every_plan_of_a_block_gives_the_same_result(name: str) -> None:
    x = nhwc(3, 16, 5, 5)
    arguments = _arguments(x, SHAPES[name])
    # an L2 that holds the expanded tensors of two images: the third is a part of its own
    tiny = Ceilings(l2_bytes=2 * 2 * 32 * 25 * 4)
    plans = _plans(x, arguments, tiny)
    assert {plan.images for plan in plans} == {2, 3}
    for plan in plans:
        y, launches = build(x, *arguments, plan=plan)
        assert len(launches) == plan.launches
        for launch in launches:
            launch.run()
        _judge(y, x, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_an_expanded_tensor_rounded_once(dtype: torch.dtype) -> None:
    x = nhwc(1, 16, 4, 4, dtype=dtype)
    arguments = _arguments(x, (3, 3))
    _judge(uib(x, *arguments), x, arguments)


def test_batch_zero_gives_an_empty_result() -> None:
    x = nhwc(0, 16, 4, 4)
    assert uib(x, *_arguments(x, (3, 3), 2)).shape == (0, 16, 2, 2)


def test_nchw_input_gives_an_nchw_result() -> None:
    x = torch.randn(2, 16, 5, 4)
    arguments = _arguments(x, (3, 3), outputs=24)
    y = uib(x, *arguments)
    _judge(y, x, arguments)
    assert y.is_contiguous()


@pytest.mark.parametrize(
    ("start", "channels", "hidden", "outputs", "dtype"),
    [
        (5, 16, 32, 16, torch.float32),
        (0, 24, 40, 33, torch.bfloat16),
        (0, 7, 9, 5, torch.float32),
        (3, 40, 70, 40, torch.float16),
    ],
)
def test_both_products_in_one_launch_match_with_tails(
    start: int, channels: int, hidden: int, outputs: int, dtype: torch.dtype
) -> None:
    x = nhwc(2, channels, 5, 3, dtype=dtype)
    arguments = _arguments(x, (start, 0), hidden=hidden, outputs=outputs)
    (plan,) = [plan for plan in _plans(x, arguments) if plan.fuse_products]
    y, launches = build(x, *arguments, plan=plan)
    assert len(launches) == plan.launches == (2 if start else 1)
    for launch in launches:
        launch.run()
    _judge(y, x, arguments)


def test_both_products_in_one_launch_address_64_bits() -> None:
    x = nhwc(1, 24, 4, 4)
    arguments = _arguments(x, (0, 0))
    (expand, project), gamma = (arguments[6:9], arguments[16:19]), arguments[19]
    results = []
    for wide in (False, True):
        y = torch.empty_like(x)
        for launch in products.build(x, *expand, "relu", *project, gamma, x, y, int64=wide):
            launch.run()
        results.append(y)
    assert torch.equal(*results)
