"""`conv_bn_act`'s Triton kernels against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ACTS, assert_earned, nhwc

from mnv4_kernels.ops.conv_bn_act.contract import fake
from mnv4_kernels.ops.conv_bn_act.reference import reference
from mnv4_kernels.ops.conv_bn_act.triton_conv_bn_act import build, conv_bn_act
from mnv4_kernels.ops.gpu.config import GemmConfig
from mnv4_kernels.ops.layout import memory_format_of


def _check(
    x: torch.Tensor,
    outputs: int,
    kernel: int = 3,
    stride: tuple[int, int] = (2, 2),
    padding: tuple[int, int, int, int] | None = None,
    dilation: tuple[int, int] = (1, 1),
    act: str = "relu",
    affine: bool = True,
    channels_last: bool = True,
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    weight = torch.randn(outputs, x.shape[1], kernel, kernel).to(x.dtype)
    scale = torch.rand(outputs) + 0.5 if affine else None
    shift = torch.randn(outputs) if affine else None
    pad = list(padding if padding is not None else (kernel // 2,) * 4)
    arguments = (scale, shift, list(stride), pad, list(dilation), act, channels_last)
    if config is None and int64 is None:
        actual = conv_bn_act(x, weight, *arguments)
    else:
        actual, launches = build(x, weight, *arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    expected = reference(x.double(), weight.double(), *arguments)
    low = reference(x, weight, *arguments)
    assert_earned(actual, expected, low, fake(x, weight, *arguments), terms=kernel * kernel * x.shape[1])
    return actual


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels", [3, 16])
def test_every_activation_matches(act: str, channels: int) -> None:
    _check(nhwc(1, channels, 5, 5), 16, act=act)


@pytest.mark.parametrize("channels", [1, 3, 4, 15, 16, 24, 33])
def test_every_channel_count_matches_on_odd_sizes(channels: int) -> None:
    _check(nhwc(2, channels, 7, 5), 24)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 2, 2, 1)])
def test_asymmetric_padding_of_tf_same_matches(channels: int, padding: tuple[int, int, int, int]) -> None:
    _check(nhwc(1, channels, 6, 4), 16, padding=padding)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(5, (1, 1), (1, 1)), (3, (1, 2), (2, 2)), (1, (2, 2), (1, 1))]
)
def test_kernels_strides_and_dilations_match(
    channels: int, kernel: int, stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    _check(nhwc(1, channels, 7, 8), 16, kernel, stride, dilation=dilation)


@pytest.mark.parametrize("outputs", [1, 17, 72])
@pytest.mark.parametrize("channels", [3, 16])
def test_output_tails_match(outputs: int, channels: int) -> None:
    _check(nhwc(1, channels, 4, 4), outputs, affine=False)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [3, 16])
def test_an_nchw_image_gives_the_format_that_was_asked_for(channels: int, channels_last: bool) -> None:
    y = _check(torch.randn(2, channels, 6, 5), 16, channels_last=channels_last)
    assert memory_format_of(y) == (torch.channels_last if channels_last else torch.contiguous_format)


def test_a_cropped_nchw_image_is_read_where_it_lies() -> None:
    _check(torch.randn(2, 3, 9, 9)[:, :, 1:8, 2:], 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [3, 16])
def test_low_precision_rounds_once(dtype: torch.dtype, channels: int) -> None:
    _check(nhwc(1, channels, 5, 5, dtype=dtype), 16)


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("block", [(16, 16, 16), (32, 64, 32)])
def test_every_tile_shape_gives_the_same_result(channels: int, block: tuple[int, int, int]) -> None:
    config = GemmConfig(4, 2, block_m=block[0], block_n=block[1], block_k=block[2])
    _check(nhwc(2, channels, 5, 5), 24, config=config)


@pytest.mark.parametrize("channels", [3, 16])
def test_forced_int64_addressing_equals_int32_bit_for_bit(channels: int) -> None:
    x = nhwc(2, channels, 5, 4)
    torch.manual_seed(1)
    narrow = _check(x, 24, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check(x, 24, int64=True), narrow)


@pytest.mark.parametrize("channels", [3, 16])
def test_batch_zero_gives_an_empty_result(channels: int) -> None:
    assert _check(nhwc(0, channels, 6, 6), 8).shape == (0, 8, 3, 3)
