"""`dwconv_bn_act`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ACTS, assert_earned, nhwc

from mnv4_kernels.ops.dwconv_bn_act.contract import fake
from mnv4_kernels.ops.dwconv_bn_act.reference import reference
from mnv4_kernels.ops.dwconv_bn_act.triton_dwconv_bn_act import build, dwconv_bn_act
from mnv4_kernels.ops.gpu.config import DepthwiseConfig
from mnv4_kernels.ops.gpu.launch import store_tap_major


def _check(
    x: torch.Tensor,
    kernel: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] | None = None,
    dilation: tuple[int, int] = (1, 1),
    act: str = "relu",
    config: DepthwiseConfig | None = None,
    affine: tuple[bool, bool] = (True, True),
    int64: bool | None = None,
) -> torch.Tensor:
    channels = x.shape[1]
    weight = torch.randn(channels, 1, kernel, kernel).to(x.dtype)
    scale = torch.rand(channels) + 0.5 if affine[0] else None
    shift = torch.randn(channels) if affine[1] else None
    pad = list(padding if padding is not None else (kernel // 2,) * 4)
    arguments = (scale, shift, list(stride), pad, list(dilation), act)
    if config is None and int64 is None:
        actual = dwconv_bn_act(x, weight, *arguments)
    else:
        actual, launches = build(x, weight, *arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    expected = reference(x.double(), weight.double(), *arguments)
    assert_earned(
        actual, expected, reference(x, weight, *arguments), fake(x, weight, *arguments), terms=kernel * kernel
    )
    return actual


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_matches(act: str) -> None:
    _check(nhwc(1, 16, 5, 5) * 3, 3, act=act)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
def test_kernels_and_strides_match_on_odd_sizes(kernel: int, stride: tuple[int, int]) -> None:
    _check(nhwc(2, 24, 9, 7), kernel, stride)


@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 2, 2, 1), (0, 0, 0, 0), (3, 0, 0, 3)])
def test_asymmetric_padding_of_tf_same_matches(padding: tuple[int, int, int, int]) -> None:
    _check(nhwc(1, 16, 8, 6), 3, (2, 2), padding)


@pytest.mark.parametrize("dilation", [(2, 2), (3, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_dilation_matches(dilation: tuple[int, int], stride: tuple[int, int]) -> None:
    _check(nhwc(1, 16, 9, 9), 3, stride, (dilation[0], dilation[0], dilation[1], dilation[1]), dilation)


@pytest.mark.parametrize("channels", [1, 3, 17, 40, 72])
def test_channel_tails_match(channels: int) -> None:
    _check(nhwc(1, channels, 4, 5), 3)


@pytest.mark.parametrize("affine", [(False, False), (True, False), (False, True)])
def test_a_missing_scale_or_shift_is_an_identity(affine: tuple[bool, bool]) -> None:
    _check(nhwc(1, 16, 4, 4), 3, affine=affine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    _check(nhwc(1, 16, 6, 6, dtype=dtype), 5, act="silu")


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("columns", [8, 32])
def test_every_tile_shape_gives_the_same_result(rows: int, columns: int) -> None:
    _check(nhwc(2, 24, 7, 7), 5, config=DepthwiseConfig(warps=4, stages=1, rows=rows, columns=columns, channels=16))


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    x = nhwc(2, 16, 6, 5)
    torch.manual_seed(1)
    narrow = _check(x, 3, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check(x, 3, int64=True), narrow)


def test_batch_zero_gives_an_empty_result() -> None:
    assert _check(nhwc(0, 16, 6, 5), 3).shape == (0, 16, 6, 5)


def test_nchw_input_gives_an_nchw_result() -> None:
    assert _check(torch.randn(2, 16, 6, 5), 3).is_contiguous()


def test_a_sliced_input_is_read_where_it_lies() -> None:
    _check(nhwc(2, 32, 6, 5)[:, 4:20, 1:], 3)


@pytest.mark.parametrize("act", ["relu", "relu6", "hard_swish", "none"])
def test_nan_and_infinity_propagate_as_in_eager(act: str) -> None:
    x = nhwc(1, 16, 5, 5)
    x[0, 3, 2, 2] = float("nan")
    x[0, 4, 1, 1] = float("inf")
    weight = torch.rand(16, 1, 3, 3) + 0.1
    arguments = (None, None, [1, 1], [1, 1, 1, 1], [1, 1], act)
    torch.testing.assert_close(dwconv_bn_act(x, weight, *arguments), reference(x, weight, *arguments), equal_nan=True)


def test_a_tap_major_weight_means_the_same_and_is_not_copied() -> None:
    x, weight = nhwc(1, 16, 5, 5), torch.randn(16, 1, 3, 3)
    stored = store_tap_major(weight)
    assert torch.equal(stored, weight)
    arguments = (None, None, [1, 1], [1, 1, 1, 1], [1, 1], "none")
    (launch,) = build(x, stored, *arguments)[1]
    assert launch.arguments[1].data_ptr() == stored.data_ptr()
    assert torch.equal(dwconv_bn_act(x, stored, *arguments), dwconv_bn_act(x, weight, *arguments))
