"""`head`'s Triton kernels against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ACTS, assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import PoolConfig
from mnv4_kernels.ops.head.contract import fake
from mnv4_kernels.ops.head.reference import reference
from mnv4_kernels.ops.head.triton_head import build, head


def _check(
    x: torch.Tensor,
    features: int = 24,
    classes: int | None = 10,
    act: str = "relu",
    affine: bool = True,
    bias: bool = True,
    config: PoolConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    weight = torch.randn(features, x.shape[1], 1, 1).to(x.dtype)
    scale = torch.rand(features) + 0.5 if affine else None
    shift = torch.randn(features) if affine else None
    classifier = (torch.randn(classes, features) / features**0.5).to(x.dtype) if classes is not None else None
    classifier_bias = torch.randn(classes).to(x.dtype) if classes is not None and bias else None
    arguments = (weight, scale, shift, act, classifier, classifier_bias)
    if config is None and int64 is None:
        actual = head(x, *arguments)
    else:
        actual, launches = build(x, *arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected = reference(x.double(), *wide)
    low = reference(x, *arguments)
    if x.dtype != torch.float32 and x.shape[0]:
        low = _stepwise(x, *arguments)
    assert_earned(actual, expected, low, fake(x, *arguments), terms=x[0].numel() if x.shape[0] else 1)
    return actual


def _stepwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    classifier: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Eager's own steps, which round the pooled values and the features."""
    pooled = x.float().mean((2, 3), keepdim=True).to(x.dtype)
    features = reference(pooled, weight, scale, shift, act, None, None)
    return features if classifier is None else torch.nn.functional.linear(features, classifier, bias)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_matches(act: str) -> None:
    _check(nhwc(2, 16, 3, 3), act=act)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 9)])
@pytest.mark.parametrize("channels", [1, 17, 40])
def test_odd_maps_and_channel_tails_match(size: tuple[int, int], channels: int) -> None:
    _check(nhwc(3, channels, *size))


@pytest.mark.parametrize("classes", [None, 1, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_every_classifier_matches(classes: int | None, bias: bool) -> None:
    _check(nhwc(2, 16, 3, 3), classes=classes, bias=bias, affine=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_eager_steps(dtype: torch.dtype) -> None:
    _check(nhwc(2, 16, 3, 3, dtype=dtype))


@pytest.mark.parametrize("positions", [4, 16])
def test_every_tile_shape_gives_the_same_result(positions: int) -> None:
    _check(nhwc(2, 40, 5, 5), config=PoolConfig(4, 1, positions=positions, channels=16))


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    x = nhwc(2, 16, 3, 3)
    torch.manual_seed(1)
    narrow = _check(x, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check(x, int64=True), narrow)


def test_batches_of_zero_one_and_seventeen_match() -> None:
    assert _check(nhwc(0, 16, 3, 3)).shape == (0, 10)
    _check(nhwc(1, 16, 3, 3))
    _check(nhwc(17, 16, 3, 3))


def test_nchw_input_gives_the_same_logits() -> None:
    _check(torch.randn(2, 16, 3, 3))
