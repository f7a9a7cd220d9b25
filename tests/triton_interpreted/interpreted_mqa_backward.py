"""`mqa_backward`'s Triton kernels against the reference, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_earned, nhwc

from mnv4_kernels.ops.gpu.config import AttentionConfig
from mnv4_kernels.ops.mqa.contract import backward_fake
from mnv4_kernels.ops.mqa.reference import backward_reference
from mnv4_kernels.ops.mqa.triton_mqa_backward import build, mqa_backward


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
) -> list[torch.Tensor]:
    query = nhwc(batch, heads * depths[0], *size, dtype=dtype) * gain
    grad = nhwc(batch, heads * depths[1], *size, dtype=dtype)
    if not channels_last:
        query, grad = query.contiguous(), grad.contiguous()
    key, value = (torch.randn(batch, keys, depth).to(dtype) for depth in depths)
    arguments = (grad, query, key, value, heads, depths[0] ** -0.5)
    if config is None and int64 is None:
        found = mqa_backward(*arguments)
    else:
        found, launches = build(*arguments, config=config, int64=int64)
        for launch in launches:
            launch.run()
    exact = backward_reference(*(value.double() for value in arguments[:4]), *arguments[4:])
    low = backward_reference(*arguments)
    # rows of queries are summed for key and value
    terms = size[0] * size[1] * heads + keys + sum(depths)
    for mine, true, eager, fake in zip(found, exact, low, backward_fake(*arguments), strict=True):
        assert_earned(mine, true, eager, fake, terms)
    return list(found)


@pytest.mark.parametrize("keys", [1, 16, 49, 64, 130])
def test_every_number_of_keys_matches(keys: int) -> None:
    _check((3, 5), keys)


@pytest.mark.parametrize("depths", [(16, 16), (48, 48), (24, 40)])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_and_depths_match(depths: tuple[int, int], heads: int) -> None:
    _check((3, 3), 20, heads, depths)


@pytest.mark.parametrize("tiles", [1, 2, 3])
@pytest.mark.parametrize("block", [16, 32])
def test_every_split_of_queries_and_keys_gives_the_same(tiles: int, block: int) -> None:
    _check((5, 5), 36, config=AttentionConfig(4, 1, queries=16, tiles=tiles, keys=block), batch=2)


@pytest.mark.parametrize("gain", [10.0, 100.0])
def test_large_scores_do_not_overflow(gain: float) -> None:
    _check((3, 3), 20, gain=gain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_matches(dtype: torch.dtype) -> None:
    _check((3, 4), 20, dtype=dtype)


def test_forced_int64_addressing_equals_int32_bit_for_bit() -> None:
    torch.manual_seed(1)
    narrow = _check((3, 4), 20, batch=2, int64=False)
    torch.manual_seed(1)
    for wide, value in zip(_check((3, 4), 20, batch=2, int64=True), narrow, strict=True):
        assert torch.equal(wide, value)


def test_batch_zero_gives_empty_gradients() -> None:
    assert [tuple(value.shape) for value in _check((3, 4), 20, batch=0)] == [(0, 32, 3, 4), (0, 20, 16), (0, 20, 16)]


def test_nchw_queries_get_an_nchw_gradient() -> None:
    assert _check((3, 4), 20, channels_last=False)[0].is_contiguous()
