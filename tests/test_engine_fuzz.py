"""Programs, shapes and thread counts at random: what the planner makes of them is what they mean.

Indices are at stake here, not roundings: a wrong one is off by as much as the values are
large. The models' tests hold the engine to the last bits.
"""

from __future__ import annotations

import pytest
import torch
from engines import needs_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import HYBRID, SMALL, create, double_of, images
from programs import RandomProgram, programs

import mnv4_kernels as mk
from mnv4_kernels.ops.engine import Engine, engine_run
from mnv4_kernels.ops.engine.programs import program_of
from mnv4_kernels.testing import LAYOUTS, forced_tier, lay_out, poisoned_memory, tiers

pytestmark = needs_engine

bounded = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@bounded
@given(
    program=programs(),
    batch=st.integers(0, 3),
    threads=st.integers(1, 3),
    tier=st.sampled_from(tiers() or [""]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_a_program_computes_what_it_means(
    program: RandomProgram, batch: int, threads: int, tier: str, layout: str
) -> None:
    torch.set_num_threads(threads)
    x = lay_out(images(batch, *program.shapes[0]), layout)
    engine = Engine(*program.tensors())
    with forced_tier(tier), poisoned_memory(), torch.no_grad():
        for tag in (0, 1):
            expected, largest = program.run(x.double(), tag)
            actual = engine_run(engine.handle, x, tag)
            shapes = program_of(engine.handle).output_shapes(tuple(x.shape), tag)
            assert [tuple(y.shape) for y in actual] == shapes == [tuple(y.shape) for y in expected]
            for mine, true in zip(actual, expected, strict=True):
                torch.testing.assert_close(mine.double(), true, rtol=0, atol=1e-4 * max(1.0, largest))


@bounded
@given(program=programs(), batch=st.integers(1, 5), threads=st.integers(2, 5), bfloat16=st.booleans())
def test_a_programs_bits_depend_on_neither_threads_nor_batch(
    program: RandomProgram, batch: int, threads: int, bfloat16: bool
) -> None:
    x = images(batch, *program.shapes[0])
    engine = Engine(*program.tensors(), bfloat16)
    torch.set_num_threads(threads)
    whole = engine_run(engine.handle, x, 0)
    torch.set_num_threads(1)
    parts = [engine_run(engine.handle, image[None], 0) for image in x]
    for index, together in enumerate(whole):
        assert torch.equal(together, torch.cat([part[index] for part in parts]))


@settings(bounded, max_examples=25)
@given(
    name=st.sampled_from([SMALL, HYBRID]),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    batch=st.integers(1, 3),
    threads=st.integers(1, 3),
)
def test_a_network_takes_any_shape(name: str, size: tuple[int, int], batch: int, threads: int) -> None:
    pytest.importorskip("timm")
    torch.set_num_threads(threads)
    model, fast = _networks(name)
    x = images(batch, 3, *size)
    with torch.no_grad():
        exact = model(x.double())
        # at a size that its norms were not calibrated for, eager's own error with a hybrid is 3e-5
        assert torch.linalg.vector_norm(fast(x) - exact) <= 1e-4 * torch.linalg.vector_norm(exact)


_CACHE: dict[str, tuple[torch.nn.Module, mk.OptimizedNetwork]] = {}


def _networks(name: str) -> tuple[torch.nn.Module, mk.OptimizedNetwork]:
    if name not in _CACHE:
        model = create(name)
        _CACHE[name] = double_of(model), mk.optimize(model)
    return _CACHE[name]
