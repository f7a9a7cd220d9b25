"""`bn_act`'s Triton kernels against the references, in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpus import by_kernels, launched
from training import CALLS, Training, check

from mnv4_kernels.ops._contract import FORMULAS, differentiable_by
from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.ops.bn_act import triton_bn_act as forward
from mnv4_kernels.ops.bn_act import triton_bn_act_backward as backward
from mnv4_kernels.ops.gpu.config import PositionsConfig
from mnv4_kernels.ops.gpu.launch import in_format
from mnv4_kernels.ops.layout import memory_format_of

CALLS = tuple(call for call in CALLS if call.op == "bn_act")
OP = by_kernels("bn_act")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_and_gradients_are_as_exact_as_plain_torch(call: Training) -> None:
    check(OP, call)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_each_activation_has_its_derivative(act: str) -> None:
    check(OP, Training("bn_act", 3, (4, 4), act=act))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_layouts(dtype: torch.dtype, layout: str) -> None:
    call = CALLS[1]
    (y,), (dx, *_) = check(OP, call, dtype, layout)
    assert y.stride() == dx.stride() == in_format(y, memory_format_of(y)).stride()


@pytest.mark.parametrize("int64", [False, True])
@pytest.mark.parametrize(("positions", "channels"), [(1, 16), (16, 32), (256, 64)])
def test_every_tile_gives_the_same(positions: int, channels: int, int64: bool) -> None:
    config = PositionsConfig(4, 1, positions, channels)
    op = differentiable_by(
        launched(forward.build, config, int64), launched(backward.build, config, int64), FORMULAS["bn_act"]
    )
    check(op, Training("bn_act", 24, (5, 4), act="silu", batch=3))


def test_an_empty_batch_has_empty_results() -> None:
    arguments = CALLS[2].arguments()
    arguments[0] = arguments[0][:0]
    arguments[3].requires_grad_()
    y = OP(*arguments)
    assert y.shape[0] == 0
    y.sum().backward()
    assert not bool(arguments[3].grad.any())
