"""`pwconv_bn_act`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ACTS, assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import GemmConfig
from mnv4_kernels.ops.pwconv_bn_act.contract import fake
from mnv4_kernels.ops.pwconv_bn_act.reference import reference
from mnv4_kernels.ops.pwconv_bn_act.triton_pwconv_bn_act import build, pwconv_bn_act


def _check(
    x: torch.Tensor,
    outputs: int,
    act: str = "relu",
    affine: bool = True,
    gamma: bool = True,
    residual: bool = True,
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    weight = torch.randn(outputs, x.shape[1], 1, 1).to(x.dtype)
    scale = torch.rand(outputs) + 0.5 if affine else None
    shift = torch.randn(outputs) if affine else None
    layer_scale = torch.randn(outputs) if gamma else None
    shortcut = torch.randn(x.shape[0], outputs, *x.shape[2:]).to(x.dtype) if residual else None
    if shortcut is not None and not x.is_contiguous():
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    arguments = (weight, scale, shift, act, layer_scale, shortcut)
    if config is None and int64 is None:
        actual = pwconv_bn_act(x, *arguments)
    else:
        actual, launches = build(x, *arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected = reference(x.double(), *wide)
    assert_earned(actual, expected, reference(x, *arguments), fake(x, *arguments), terms=x.shape[1])
    return actual


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_matches(act: str) -> None:
    _check(nhwc(1, 16, 3, 5), 16, act)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_epilogue_matches(affine: bool, gamma: bool, residual: bool) -> None:
    _check(nhwc(1, 24, 3, 3), 40, affine=affine, gamma=gamma, residual=residual)


@pytest.mark.parametrize("channels", [1, 17, 72])
@pytest.mark.parametrize("outputs", [1, 24, 130])
def test_tails_of_both_channel_counts_match(channels: int, outputs: int) -> None:
    _check(nhwc(2, channels, 5, 5), outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    _check(nhwc(1, 32, 4, 4, dtype=dtype), 16)


@pytest.mark.parametrize("block", [(16, 16, 16), (32, 64, 32), (64, 32, 16)])
@pytest.mark.parametrize("group_m", [1, 3])
def test_every_tile_shape_gives_the_same_result(block: tuple[int, int, int], group_m: int) -> None:
    config = GemmConfig(4, 2, block_m=block[0], block_n=block[1], block_k=block[2], group_m=group_m)
    _check(nhwc(2, 40, 7, 7), 72, config=config)


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
