"""What making an engine needs: one array of a program at a time, folded as if all were folded at once."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import needs_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HYBRID, SMALL, create, images
from programs import RandomProgram, programs

import mnv4_kernels as mk
from mnv4_kernels.backends import native
from mnv4_kernels.ops.engine import Engine, Weight, engine_run

pytestmark = needs_engine

#: Tells the MB of the weights and of the engine, what the process holds before it is made, the most that it has held
#: since its peak was forgotten, and what making and the first call take at most.
MAKING = """
import json
import sys
import timm
import torch
import mnv4_kernels as mk
from mnv4_kernels.backends import native
from mnv4_kernels.benchmark.foreign.player import forget_peak, resident

torch.set_num_threads(1)
create, how, dtype = timm.create_model, sys.argv[1], getattr(torch, sys.argv[2])
x = torch.zeros(1, 3, 64, 64, dtype=dtype if how == "patch" else torch.float32)

def made(name):
    model = create(name).eval()
    if how == "patch":
        model = model.to(dtype)
        def call():
            mk.patch(model)
            return model(x)
    else:
        def call():
            fast = mk.optimize(model, dtype)
            return fast, fast(x)
    return model, call

with torch.no_grad():
    # the code that runs for the first time needs memory, too
    made("mobilenetv4_conv_small_035")[1]()
    model, call = made("mobilenetv4_conv_medium")
    forget_peak()
    before, forgotten = resident()
    result = call()
    taken = resident()[1] - before
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
print(json.dumps([weights / 1e6, native.module().engine_bytes() / 1e6, before, forgotten, taken]))
"""


@pytest.mark.parametrize(("how", "dtype"), [("optimize", "float32"), ("optimize", "bfloat16"), ("patch", "float32")])
def test_folded_weights_are_never_held_together_with_packed_ones(how: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    # elsewhere, for python -c imports the working directory's package, which may be one without its kernels
    done = subprocess.run(
        [sys.executable, "-c", MAKING, how, dtype], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    weights, engine, before, forgotten, taken = json.loads(done.stdout)
    if forgotten > before + 1:
        pytest.skip("this kernel does not forget a process's peak")
    # beside the engine: one array, at most an eighth of the weights, its folding, and objects without weights
    assert engine / 2 < taken < engine + weights / 3


def one_by_one(arrays: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """What makes copies of `arrays`, and fails while an earlier one is still held."""
    made: list[weakref.ref[torch.Tensor]] = []

    def maker(array: torch.Tensor) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            assert all(earlier() is None for earlier in made)
            copy = array.clone()
            made.append(weakref.ref(copy))
            return copy

        return make

    return [maker(array) for array in arrays]


@settings(max_examples=50, deadline=None)
@given(program=programs(), bfloat16=st.booleans())
def test_an_array_is_dropped_before_the_next_is_made(program: RandomProgram, bfloat16: bool) -> None:
    rows, arrays = program.tensors()
    x = images(2, *program.shapes[0])
    whole, parts = Engine(rows, arrays, bfloat16), Engine(rows, one_by_one(arrays), bfloat16)
    assert all(map(torch.equal, engine_run(parts.handle, x, 0), engine_run(whole.handle, x, 0)))
    assert all(map(torch.equal, parts.arrays(), whole.arrays()))


def test_an_array_that_cannot_be_made_leaves_no_engine() -> None:
    def fail() -> torch.Tensor:
        raise ValueError("no such weight")

    program = RandomProgram((16, 4, 4), 0)
    program.add("input", -1, (16, 4, 4), [])
    program.add("pointwise", 0, (16, 4, 4), [(16, 16), (16,)])
    rows, arrays = program.tensors()
    gc.collect()
    before = native.module().engine_bytes()
    with pytest.raises(ValueError, match="no such weight"):
        Engine(rows, [arrays[0], fail])
    gc.collect()
    assert native.module().engine_bytes() == before


def test_too_few_arrays_are_refused_before_one_is_made() -> None:
    program = RandomProgram((16, 4, 4), 0)
    program.add("input", -1, (16, 4, 4), [])
    program.add("pointwise", 0, (16, 4, 4), [(16, 16), (16,)])
    rows, _ = program.tensors()
    with pytest.raises(RuntimeError, match=r"`program` row 1 must have .* and existing arrays"):
        Engine(rows, [pytest.fail])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1), (1, 1, 3, 3), (130, 700), (50, 33, 5, 5), (2, 40000, 1, 1)])
def test_a_weight_folded_in_slices_has_the_bits_of_one_folded_at_once(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    first, second = (torch.randn(shape[0], generator=generator, dtype=torch.float64) for _ in range(2))
    before = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    ones = [1] * (len(shape) - 2)
    wide = tensor.double() * first.view(-1, 1, *ones) * second.view(-1, 1, *ones) * before.view(1, -1, *ones)
    weight = Weight(tensor).scaled(first).scaled(second).behind(before)
    assert torch.equal(weight.rounded(dtype), wide.to(dtype).float())
    assert torch.equal(weight.wide(), wide)


def test_a_weight_without_factors_is_the_parameter_itself() -> None:
    tensor = torch.randn(5, 7)
    assert Weight(tensor).scaled(None).behind(None).rounded(torch.float32) is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_a_copy_made_of_all_arrays_at_once_has_the_same_bits(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("timm")
    with torch.no_grad():
        fast = mk.optimize(create(name), dtype)
        (part,) = fast.parts
        again = Engine(part.program, part.arrays, part.in_bfloat16)
        assert torch.equal(engine_run(again.handle, images(), 0)[0], fast(images()))
