"""`kv_downsample`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import GemmConfig
from mnv4_kernels.ops.kv_downsample.contract import fake
from mnv4_kernels.ops.kv_downsample.reference import reference
from mnv4_kernels.ops.kv_downsample.triton_kv_downsample import build, kv_downsample


def _check(
    x: torch.Tensor,
    depths: tuple[int, int] = (16, 16),
    down: bool = True,
    affine: bool = True,
    kernel: int = 3,
    stride: int = 2,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    sets = []
    for depth in depths:
        sets += [
            torch.randn(channels, 1, kernel, kernel).to(x.dtype) if down else None,
            torch.rand(channels) + 0.5 if affine else None,
            torch.randn(channels) if affine else None,
            torch.randn(depth, channels, 1, 1).to(x.dtype),
        ]
    arguments = (*sets, [stride, stride], list(padding), [1, 1])
    if config is None and int64 is None:
        actual = kv_downsample(x, *arguments)
    else:
        actual, launches = build(x, *arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected, low, shapes = reference(x.double(), *wide), reference(x, *arguments), fake(x, *arguments)
    for found, exact, eager, shape in zip(actual, expected, low, shapes, strict=True):
        if x.dtype != torch.float32:
            # the reference keeps the downsampled map in float32; a matrix product's operand is rounded
            eager = _with_rounded_operand(x, arguments, found is actual[1])
        assert_earned(found, exact, eager, shape, terms=channels + kernel * kernel)
    return actual


def _with_rounded_operand(x: torch.Tensor, arguments: tuple, value: bool) -> torch.Tensor:
    down, scale, shift, project = arguments[4:8] if value else arguments[0:4]
    *_, stride, padding, dilation = arguments
    identity = torch.eye(x.shape[1]).to(x.dtype)[:, :, None, None]
    low = reference(x, down, scale, shift, identity, down, scale, shift, identity, stride, padding, dilation)[0]
    return (low.float() @ project.flatten(1).float().T).to(x.dtype)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 1)])
def test_key_and_value_match_on_odd_sizes(size: tuple[int, int]) -> None:
    _check(nhwc(2, 24, *size))


@pytest.mark.parametrize("depths", [(16, 16), (24, 40), (1, 48)])
@pytest.mark.parametrize("channels", [1, 17, 40])
def test_tails_of_depths_and_channels_match(depths: tuple[int, int], channels: int) -> None:
    _check(nhwc(1, channels, 5, 5), depths)


@pytest.mark.parametrize("affine", [False, True])
def test_without_downsampling_every_position_is_a_key(affine: bool) -> None:
    key, _ = _check(nhwc(2, 16, 4, 3), down=False, affine=affine)
    assert key.shape == (2, 12, 16)


def test_asymmetric_padding_of_tf_same_matches() -> None:
    _check(nhwc(1, 16, 6, 6), padding=(0, 1, 0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches_an_operand_rounded_once(dtype: torch.dtype) -> None:
    _check(nhwc(1, 32, 5, 5, dtype=dtype))


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 64, 32)])
def test_every_tile_shape_gives_the_same_result(block: tuple[int, int, int]) -> None:
    config = GemmConfig(4, 1, block_m=block[0], block_n=block[1], block_k=block[2])
    _check(nhwc(2, 40, 7, 7), config=config)


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    x = nhwc(2, 16, 4, 4)
    torch.manual_seed(1)
    narrow = _check(x, int64=False)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(_check(x, int64=True), narrow, strict=True))


def test_batch_zero_gives_empty_results() -> None:
    assert _check(nhwc(0, 16, 4, 4))[0].shape == (0, 4, 16)


def test_nchw_input_gives_the_same_rows() -> None:
    _check(torch.randn(2, 16, 5, 4))
