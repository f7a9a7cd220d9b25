"""`mqa_projected`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import AttentionConfig
from mnv4_kernels.ops.mqa_projected.contract import fake
from mnv4_kernels.ops.mqa_projected.reference import reference
from mnv4_kernels.ops.mqa_projected.triton_mqa_projected import build, mqa_projected

pytestmark = pytest.mark.usefixtures("fuse")


def _check(
    size: tuple[int, int],
    keys: int,
    heads: int = 2,
    depths: tuple[int, int] = (16, 16),
    channels: int = 24,
    outputs: int = 24,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    epilogue: bool = True,
    channels_last: bool = True,
    config: AttentionConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    x = nhwc(batch, channels, *size, dtype=dtype)
    x = x if channels_last else x.contiguous()
    inner = heads * depths[0]
    query = (torch.randn(inner, channels, 1, 1) / channels**0.5).to(dtype)
    affine = (torch.rand(inner) + 0.5, torch.randn(inner)) if epilogue else (None, None)
    key, value = torch.randn(batch, keys, depths[0]).to(dtype), torch.randn(batch, keys, depths[1]).to(dtype)
    output = (torch.randn(outputs, heads * depths[1], 1, 1) / 4).to(dtype)
    gamma = torch.randn(outputs) if epilogue else None
    residual = nhwc(batch, outputs, *size, dtype=dtype) if epilogue else None
    arguments = (x, query, *affine, key, value, output, gamma, residual, heads, depths[0] ** -0.5)
    if config is None and int64 is None:
        actual = mqa_projected(*arguments)
    else:
        actual, launches = build(*arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    wide = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
    assert_earned(actual, reference(*wide), reference(*arguments), fake(*arguments), terms=keys + channels + inner)
    return actual


@pytest.mark.parametrize("keys", [1, 16, 49])
def test_every_number_of_keys_matches(keys: int) -> None:
    _check((3, 5), keys)


@pytest.mark.parametrize("depths", [(16, 16), (48, 24)])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_and_depths_match(depths: tuple[int, int], heads: int) -> None:
    _check((3, 3), 20, heads, depths)


@pytest.mark.parametrize("channels", [1, 17, 72])
@pytest.mark.parametrize("outputs", [1, 40])
def test_tails_of_both_channel_counts_match(channels: int, outputs: int) -> None:
    _check((3, 3), 9, channels=channels, outputs=outputs)


def test_the_bare_block_matches() -> None:
    _check((3, 3), 9, epilogue=False)


def test_wide_outputs_and_many_keys_take_three_launches() -> None:
    _check((2, 2), 9, outputs=264)
    _check((2, 2), 300, config=AttentionConfig(4, 1, queries=16, tiles=1, keys=256))


@pytest.mark.parametrize("queries", [16, 32])
def test_every_tile_shape_gives_the_same_result(queries: int) -> None:
    _check((5, 5), 20, batch=2, config=AttentionConfig(4, 1, queries=queries, tiles=1, keys=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches(dtype: torch.dtype) -> None:
    _check((3, 4), 20, dtype=dtype)


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    torch.manual_seed(1)
    narrow = _check((3, 4), 20, batch=2, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check((3, 4), 20, batch=2, int64=True), narrow)


def test_batch_zero_gives_an_empty_result() -> None:
    assert _check((3, 4), 20, batch=0).shape == (0, 24, 3, 4)


def test_nchw_input_gives_an_nchw_result() -> None:
    assert _check((3, 4), 20, channels_last=False).is_contiguous()


@pytest.mark.parametrize("fuse", [False], ids=["unfused"], indirect=True)
def test_where_the_gate_declines_a_launch_for_each_part_matches(fuse: bool) -> None:
    _check((3, 5), 16)
