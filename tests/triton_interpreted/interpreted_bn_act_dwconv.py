"""`bn_act_dwconv`'s Triton kernels against the references, in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpus import by_kernels, launched
from training import CALLS, Training, check, plain

from mnv4_kernels.ops._contract import FORMULAS, differentiable_by
from mnv4_kernels.ops.bn_act_dwconv import triton_bn_act_dwconv as forward
from mnv4_kernels.ops.bn_act_dwconv import triton_bn_act_dwconv_backward as backward
from mnv4_kernels.ops.gpu.config import DepthwiseConfig, PositionsConfig
from mnv4_kernels.ops.layout import is_channels_last

DEPTHWISE = [call for call in CALLS if call.op == "bn_act_dwconv"]

OP = by_kernels("bn_act_dwconv")


@pytest.mark.parametrize("call", DEPTHWISE, ids=str)
def test_results_and_gradients_are_as_exact_as_plain_torch(call: Training) -> None:
    check(OP, call)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_results_and_gradients_lie_in_memory_as_the_input_does(layout: str) -> None:
    call = DEPTHWISE[3]
    (z, *_), (dx, *_) = check(OP, call, torch.bfloat16, layout)
    nhwc = is_channels_last(call.arguments(layout=layout)[0])
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    assert z.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_float32_sums(dtype: torch.dtype) -> None:
    check(OP, DEPTHWISE[4], dtype)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    check(OP, Training("bn_act_dwconv", 16, (12, 12), act="none"), centre=100.0)


@pytest.mark.parametrize("int64", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "positions", "channels"), [(1, 1, 1, 16), (3, 8, 16, 32), (8, 64, 256, 64)]
)
def test_every_tile_gives_the_same(rows: int, columns: int, positions: int, channels: int, int64: bool) -> None:
    call = Training("bn_act_dwconv", 24, (5, 4), kernel=(5, 5), stride=2, padding=(2, 2, 2, 2), act="silu")
    op = differentiable_by(
        launched(forward.build, DepthwiseConfig(4, 1, rows, columns, channels), int64),
        launched(backward.build, PositionsConfig(4, 1, positions, channels), int64),
        FORMULAS["bn_act_dwconv"],
    )
    check(op, call)


@pytest.mark.slow
def test_more_parts_than_one_launch_joins_are_joined_in_several() -> None:
    call = Training("bn_act_dwconv", 3, (16, 17), batch=1)
    forward_tile, backward_tile = DepthwiseConfig(4, 1, 1, 1, 16), PositionsConfig(4, 1, 1, 16)
    arguments = call.arguments(layout="channels_last")
    _, launches = forward.build(*arguments, forward_tile)
    assert len(launches) == 3
    z = arguments[0]
    vector = torch.zeros(3)
    saved = (z, vector, vector, z, vector, z, *arguments[1:11], True, True)
    assert len(backward.build(*saved, backward_tile)[1]) == 4

    op = differentiable_by(
        launched(forward.build, forward_tile), launched(backward.build, backward_tile), FORMULAS["bn_act_dwconv"]
    )
    check(op, call)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs: tuple[bool, bool]) -> None:
    call = DEPTHWISE[2]
    arguments = call.arguments(layout="channels_last")
    z, z_mean, _ = plain(call)(*arguments)
    given = (torch.randn_like(z), torch.randn(16), torch.randn(16), z, z_mean, *arguments[:11], *needs)
    found = backward.bn_act_dwconv_backward(*given)
    expected = backward.backward_reference(*given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_empty_results() -> None:
    arguments = DEPTHWISE[1].arguments()
    arguments[0] = arguments[0][:0]
    assert forward.bn_act_dwconv(*arguments)[0].shape[0] == 0
