"""Kernels reach their share of the arithmetic that the same core does in the same second.

Both are single-threaded and stay within the caches of a core, and the best of many interleaved
rounds is taken, so that neither other work nor another machine moves the ratio: what falls
below a bound has become slower, not unlucky. Bounds are a tenth below what was measured.
"""

from __future__ import annotations

import pytest
import torch
from engines import needs_engine
from models import images
from programs import RandomProgram

from mnv4_kernels.backends import native
from mnv4_kernels.ops.engine import Engine, engine_profile
from mnv4_kernels.testing import forced_tier, tiers

pytestmark = [pytest.mark.speed, needs_engine]

ROUNDS = 12


def share_of_peak(program: RandomProgram, flops: int) -> float:
    """Of the multiply-add loop's rate, the best of all rounds; the node before the output is what counts."""
    torch.set_num_threads(1)
    engine = Engine(*program.tensors())
    x = images(1, *program.shapes[0])
    peak, seconds = 0.0, float("inf")
    for _ in range(ROUNDS):
        peak = max(peak, native.module().peak_gflops(False, 1))
        times, nodes, _ = engine_profile(engine.handle, x, 0, 10)
        seconds = min(seconds, times[:, nodes == len(program.rows) - 2].sum(1).min().item())
    return flops / seconds / 1e9 / peak


def program_of(kind: str, shape: tuple[int, int, int], outputs: int, taps: int = 1, stride: int = 1) -> RandomProgram:
    """The node in question, behind a 1x1 convolution, on which a depthwise one would ride."""
    c, h, w = shape
    program = RandomProgram(shape, 0)
    program.add("input", -1, shape, [])
    if kind != "depthwise":
        program.add("pointwise", 0, shape, [(c, c), (c,)])
    weight = (outputs, c) if kind == "pointwise" else (outputs, 1 if kind == "depthwise" else c, taps, taps)
    window = {f"{name}_{axis}": value for name, value in (("kernel", taps), ("stride", stride)) for axis in "hw"}
    pads = {f"pad_{side}": taps // 2 for side in ("top", "bottom", "left", "right")}
    geometry = {} if kind == "pointwise" else window | pads
    source = len(program.rows) - 1
    program.add(kind, source, (outputs, h // stride, w // stride), [weight, (outputs,)], act=1, **geometry)
    program.add("output", source + 1, program.shapes[-1], [], channels=0)
    return program


#: kind, input, outputs, taps, stride, and the least share of the peak by tier
NODES = [
    ("pointwise", (96, 14, 14), 384, 1, 1, {"avx2": 0.83, "avx512": 0.87}),
    ("pointwise", (128, 7, 7), 512, 1, 1, {"avx2": 0.80, "avx512": 0.86}),
    ("conv", (32, 28, 28), 32, 5, 1, {"avx2": 0.77, "avx512": 0.84}),
    # by Winograd's products, which are fewer operations than are counted
    ("conv", (32, 28, 28), 32, 3, 1, {"avx2": 0.83, "avx512": 1.37}),
    ("conv", (32, 56, 56), 96, 3, 2, {"avx2": 0.82, "avx512": 1.10}),
    ("depthwise", (96, 28, 28), 96, 5, 1, {"avx2": 0.77, "avx512": 0.93}),
    ("depthwise", (96, 14, 14), 96, 3, 1, {"avx2": 0.60, "avx512": 0.62}),
]


@pytest.mark.parametrize(("kind", "shape", "outputs", "taps", "stride", "least"), NODES)
@pytest.mark.parametrize("tier", [tier for tier in ("avx2", "avx512") if tier in tiers()])
def test_a_node_reaches_its_share_of_the_peak(
    tier: str, kind: str, shape: tuple[int, int, int], outputs: int, taps: int, stride: int, least: dict[str, float]
) -> None:
    pixels = shape[1] * shape[2] // stride**2
    flops = 2 * pixels * outputs * taps**2 * (1 if kind == "depthwise" else shape[0])
    with forced_tier(tier):
        assert share_of_peak(program_of(kind, shape, outputs, taps, stride), flops) >= least[tier]
