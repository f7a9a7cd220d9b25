"""`mqa`'s Triton kernel against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import AttentionConfig
from mnv4_kernels.ops.mqa.contract import fake
from mnv4_kernels.ops.mqa.reference import reference
from mnv4_kernels.ops.mqa.triton_mqa import build, mqa


def _check(
    size: tuple[int, int],
    keys: int,
    heads: int = 2,
    depths: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    gain: float = 1.0,
    channels_last: bool = True,
    config: AttentionConfig | None = None,
    int64: bool | None = None,
) -> torch.Tensor:
    query = nhwc(batch, heads * depths[0], *size, dtype=dtype) * gain
    query = query if channels_last else query.contiguous()
    key = torch.randn(batch, keys, depths[0]).to(dtype)
    value = torch.randn(batch, keys, depths[1]).to(dtype)
    arguments = (query, key, value, heads, depths[0] ** -0.5)
    if config is None and int64 is None:
        actual = mqa(*arguments)
    else:
        actual, launches = build(*arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    expected = reference(query.double(), key.double(), value.double(), *arguments[3:])
    assert_earned(actual, expected, reference(*arguments), fake(*arguments), terms=keys + depths[0])
    return actual


@pytest.mark.parametrize("keys", [1, 16, 49, 64, 130])
def test_every_number_of_keys_on_chip_matches(keys: int) -> None:
    _check((3, 5), keys)


@pytest.mark.parametrize("depths", [(16, 16), (48, 48), (24, 40)])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_heads_and_depths_match(depths: tuple[int, int], heads: int) -> None:
    _check((3, 3), 20, heads, depths)


@pytest.mark.parametrize("keys", [33, 64])
def test_more_keys_than_a_block_pass_in_blocks(keys: int) -> None:
    _check((3, 5), keys, config=AttentionConfig(4, 1, queries=16, tiles=1, keys=16))


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_tiles_of_one_program_cover_all_queries_and_no_more(tiles: int) -> None:
    _check((5, 5), 20, config=AttentionConfig(4, 1, queries=16, tiles=tiles, keys=32), batch=2)


@pytest.mark.parametrize("gain", [100.0, 1e4])
def test_large_scores_do_not_overflow(gain: float) -> None:
    _check((3, 3), 20, gain=gain)
    _check((3, 3), 20, gain=gain, config=AttentionConfig(4, 1, queries=16, tiles=1, keys=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches(dtype: torch.dtype) -> None:
    _check((3, 4), 20, dtype=dtype)


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    torch.manual_seed(1)
    narrow = _check((3, 4), 20, batch=2, int64=False)
    torch.manual_seed(1)
    assert torch.equal(_check((3, 4), 20, batch=2, int64=True), narrow)


def test_batch_zero_gives_an_empty_result() -> None:
    assert _check((3, 4), 20, batch=0).shape == (0, 32, 3, 4)


def test_nchw_queries_give_an_nchw_result() -> None:
    assert _check((3, 4), 20, channels_last=False).is_contiguous()
