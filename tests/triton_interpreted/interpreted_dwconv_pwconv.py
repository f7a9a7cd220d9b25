"""`dwconv_pwconv`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ACTS, assert_earned, nhwc

from mnv4_kernels.ops.dwconv_pwconv.contract import fake
from mnv4_kernels.ops.dwconv_pwconv.reference import reference
from mnv4_kernels.ops.dwconv_pwconv.triton_dwconv_pwconv import build, dwconv_pwconv
from mnv4_kernels.ops.gpu.config import DepthwiseGemmConfig

pytestmark = pytest.mark.usefixtures("fuse")


def _check(
    x: torch.Tensor,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int, int, int] | None = None,
    dilation: int = 1,
    acts: tuple[str, str] = ("relu", "none"),
    affine: bool = True,
    epilogue: bool = True,
    config: DepthwiseGemmConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    channels = x.shape[1]
    pad = list(padding if padding is not None else (dilation * (kernel // 2),) * 4)
    geometry = ([stride, stride], pad, [dilation, dilation], acts[0])
    dw_weight = torch.randn(channels, 1, kernel, kernel).to(x.dtype)
    dw_affine = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    weight = torch.randn(outputs, channels, 1, 1).to(x.dtype)
    pw_affine = (torch.rand(outputs) + 0.5, torch.randn(outputs)) if affine else (None, None)
    gamma = torch.randn(outputs) if epilogue else None
    arguments = (dw_weight, *dw_affine, *geometry, weight, *pw_affine, acts[1], gamma)
    shape = fake(x, *arguments, None)
    residual = torch.randn_like(shape) if epilogue else None
    if config is None and int64 is None:
        actual = dwconv_pwconv(x, *arguments, residual)
    else:
        actual, launches = build(x, *arguments, residual, config=config, int64=int64)
        for launch in launches:
            launch.run()
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in (*arguments, residual)]
    low = reference(x, *arguments, residual)
    assert_earned(actual, reference(x.double(), *wide), low, shape, terms=channels + kernel * kernel)
    return actual


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_of_both_convolutions_matches(act: str) -> None:
    _check(nhwc(1, 16, 4, 5), 16, acts=(act, "none"))
    _check(nhwc(1, 16, 4, 5), 16, acts=("none", act))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_and_strides_match_on_odd_sizes(kernel: int, stride: int) -> None:
    _check(nhwc(2, 24, 7, 5), 40, kernel, stride)


@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 2, 2, 1)])
def test_asymmetric_padding_of_tf_same_matches(padding: tuple[int, int, int, int]) -> None:
    _check(nhwc(1, 16, 6, 4), 16, 3, 2, padding)


def test_dilation_matches() -> None:
    _check(nhwc(1, 16, 7, 6), 16, dilation=2)


@pytest.mark.parametrize("channels", [1, 17, 72])
@pytest.mark.parametrize("outputs", [3, 24, 130])
def test_tails_of_both_channel_counts_match(channels: int, outputs: int) -> None:
    _check(nhwc(1, channels, 3, 3), outputs)


def test_the_bare_product_matches() -> None:
    _check(nhwc(1, 16, 4, 4), 16, affine=False, epilogue=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_a_hidden_tensor_rounded_once(dtype: torch.dtype) -> None:
    _check(nhwc(1, 32, 4, 4, dtype=dtype), 16)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("block", [(16, 16, 16), (32, 64, 32)])
def test_every_tile_shape_gives_the_same_result(rows: int, block: tuple[int, int, int]) -> None:
    config = DepthwiseGemmConfig(4, 1, rows=rows, columns=block[0], block_n=block[1], block_k=block[2])
    _check(nhwc(2, 40, 5, 5), 72, config=config)


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    x = nhwc(2, 16, 3, 5)
    torch.manual_seed(1)
    narrow = _check(x, 24, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check(x, 24, int64=True), narrow)


def test_batch_zero_gives_an_empty_result() -> None:
    assert _check(nhwc(0, 16, 3, 5), 8).shape == (0, 8, 3, 5)


def test_nchw_input_gives_an_nchw_result() -> None:
    assert _check(torch.randn(2, 16, 3, 5), 8).is_contiguous()


@pytest.mark.parametrize("fuse", [False], ids=["unfused"], indirect=True)
def test_where_the_gate_declines_a_launch_for_each_part_matches(fuse: bool) -> None:
    _check(nhwc(2, 24, 7, 5), 40)
