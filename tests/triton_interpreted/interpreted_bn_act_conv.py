"""The Triton kernels of `bn_act_conv` and `bn_act_pwconv` against the references, in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpus import by_kernels, launched
from training import CALLS, Training, check, plain

from mnv4_kernels.ops._contract import FORMULAS, differentiable_by
from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv as forward
from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv_backward as backward
from mnv4_kernels.ops.bn_act_conv.reference import backward_reference
from mnv4_kernels.ops.gpu.config import GemmConfig, SplitConfig
from mnv4_kernels.ops.layout import is_channels_last

OPS = ("bn_act_conv", "bn_act_pwconv")
DENSE = [call for call in CALLS if call.op in OPS]
LARGE = (DENSE[1], DENSE[7], DENSE[10])
BY_KERNELS = {op: by_kernels(op) for op in OPS}

#: geometries that the phases of dx have to get right, and an image whose gradient is asked for
EXTRA = (
    Training("bn_act_conv", 16, (7, 8), 16, stride=3, padding=(1, 0, 2, 1), act="silu"),
    Training("bn_act_conv", 16, (5, 9), 16, kernel=(2, 5), stride=3, padding=(0, 0, 2, 2), act="none"),
    Training("bn_act_conv", 16, (9, 9), 16, kernel=(1, 1), stride=2, padding=(0, 0, 0, 0)),
    Training("bn_act_conv", 16, (1, 2), 16, stride=2),
    Training("bn_act_conv", 3, (9, 8), 20, stride=2, act="gelu"),
    Training("bn_act_pwconv", 130, (3, 5), 150, act="silu"),
)


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, marks=pytest.mark.slow) if call in LARGE else call for call in (*DENSE, *EXTRA)],
    ids=str,
)
def test_results_and_gradients_are_as_exact_as_plain_torch(call: Training) -> None:
    check(BY_KERNELS[call.op], call)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("call", [DENSE[2], DENSE[8], DENSE[11]], ids=str)
def test_results_and_gradients_lie_in_memory_as_the_input_does(call: Training, layout: str) -> None:
    (z, *_), (dx, *_) = check(BY_KERNELS[call.op], call, torch.bfloat16, layout)
    nhwc = is_channels_last(call.arguments(layout=layout)[0])
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    assert z.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


def test_an_image_can_become_a_channels_last_map() -> None:
    call = DENSE[8]
    arguments = call.arguments()
    z, *_ = forward.bn_act_conv(*arguments, True)
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, plain(call)(*arguments)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("call", "dtype"), [(DENSE[2], torch.bfloat16), (DENSE[11], torch.float16)], ids=str)
def test_low_precision_keeps_float32_sums(call: Training, dtype: torch.dtype) -> None:
    check(BY_KERNELS[call.op], call, dtype)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    check(BY_KERNELS["bn_act_pwconv"], Training("bn_act_pwconv", 16, (12, 12), 32, act="none"), centre=100.0)


@pytest.mark.parametrize(
    ("tile", "parts", "int64"),
    [((16, 16, 16), 1, True), ((64, 32, 16), 5, False), ((32, 64, 64), 1000, True)],
)
def test_every_tile_gives_the_same(tile: tuple[int, int, int], parts: int, int64: bool) -> None:
    config, split = GemmConfig(4, 2, *tile, group_m=2), SplitConfig(4, 2, *tile, parts=parts)
    call = Training("bn_act_conv", 24, (7, 6), 40, stride=2, act="silu")
    op = differentiable_by(
        launched(forward.build, False, config, int64),
        launched(backward.build, config, split, int64),
        FORMULAS["bn_act_conv"],
    )
    check(op, call)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_is_computed(needs: tuple[bool, bool]) -> None:
    call = DENSE[10]
    arguments = call.arguments(layout="channels_last")
    z, z_mean, _ = plain(call)(*arguments)
    given = (torch.randn_like(z), torch.randn(48), torch.randn(48), z, z_mean, *arguments[:11], *needs)
    found = backward.bn_act_conv_backward(*given)
    expected = backward_reference(*given)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_product_of_stride_two_multiplies_no_zeros() -> None:
    """Nine taps over four phases: one, two, two and four."""
    call = DENSE[10]
    arguments = call.arguments(layout="channels_last")
    z = plain(call)(*arguments)[0]
    _, launches = backward.build(torch.randn_like(z), None, None, None, None, *arguments[:11], True, False)
    taps = [launch.constants["TAPS_H"] * launch.constants["TAPS_W"] for launch in launches[:4]]
    assert sorted(taps) == [1, 2, 2, 4]


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_has_empty_results(op: str) -> None:
    arguments = next(call for call in DENSE if call.op == op).arguments()
    arguments[0] = arguments[0][:0]
    arguments[7].requires_grad_()
    z, *_ = BY_KERNELS[op](*arguments)
    assert z.shape[0] == 0
    z.sum().backward()
    assert not bool(arguments[7].grad.any())
