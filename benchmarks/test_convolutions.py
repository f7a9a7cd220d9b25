"""Times each convolution of a model, ours beside eager in channels_last; results are compared before.

pytest benchmarks --benchmark-only --model mobilenetv4_conv_medium --batch 1 --threads 2
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import CallShape
from torch.nn import functional as F

from mnv4_kernels import ops
from mnv4_kernels.backends import native

Call = Callable[[], torch.Tensor]


def calls(shape: CallShape, batch: int) -> dict[str, Call]:
    """The same convolution, normalised and activated, by both sides, ready to run."""
    generator = torch.Generator().manual_seed(0)
    depthwise = shape.op == "dwconv_bn_act"
    x = torch.randn((batch, shape.channels, *shape.size), generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn((shape.outputs, 1 if depthwise else shape.channels, *shape.kernel), generator=generator)
    weight /= weight[0].numel() ** 0.5
    shift = torch.randn(shape.outputs, generator=generator)
    packed = ops.prepack(weight, depthwise) if native.available() else None
    top, left = shape.padding
    geometry = (list(shape.stride), [top, top, left, left], [1, 1], "relu")
    ours: dict[str, Call] = {
        "dwconv_bn_act": lambda: ops.dwconv_bn_act(x, weight, None, shift, *geometry, packed),
        "conv_bn_act": lambda: ops.conv_bn_act(x, weight, None, shift, *geometry, True, packed),
        "pwconv_bn_act": lambda: ops.pwconv_bn_act(x, weight, None, shift, "relu", None, None, packed),
    }
    filters = weight.to(memory_format=torch.channels_last)
    groups = shape.channels if depthwise else 1

    def eager() -> torch.Tensor:
        return F.relu_(F.conv2d(x, filters, shift, shape.stride, shape.padding, groups=groups))

    return {"ours": ours[shape.op], "eager": eager}


@pytest.mark.parametrize("side", ["ours", "eager"])
def test_convolution(shape: CallShape, side: str, batch: int, benchmark: BenchmarkFixture) -> None:
    both = calls(shape, batch)
    benchmark.group = shape.name
    with torch.no_grad():
        torch.testing.assert_close(both["ours"](), both["eager"](), rtol=1e-4, atol=1e-4)
        benchmark(both[side])
