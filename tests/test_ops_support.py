"""One list per op answers what can run a call, and says in words what can't."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mnv4_kernels import environment, functional, testing
from mnv4_kernels.backends import cuda, native
from mnv4_kernels.functional._run import run
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.support import Backend, backends_of, library_reasons
from mnv4_kernels.testing import CASES

OPS = sorted({case.op for case in CASES})
FIRST = {op: next(case for case in CASES if case.op == op) for op in OPS}


@pytest.mark.parametrize("op", OPS)
class TestEachOp:
    def test_the_cpp_kernel_runs_ordinary_calls_unless_the_library_is_missing(self, op: str) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert _cpp_reasons(op, FIRST[op].arguments(dtype)) == native.reasons()

    def test_float64_is_declined_by_name(self, op: str) -> None:
        reasons = _cpp_reasons(op, FIRST[op].arguments(torch.float64))
        first = "query" if op == "mqa" else "x"
        assert f"`{first}` is float64; the C++ kernels take float32, bfloat16 and float16" in reasons

    def test_another_device_is_declined_by_name(self, op: str) -> None:
        reasons = _cpp_reasons(op, tuple(_to_meta(value) for value in FIRST[op].arguments()))
        first = "query" if op == "mqa" else "x"
        assert f"`{first}` is on meta; the C++ kernels run on cpu" in reasons

    @pytest.mark.parametrize("own", [True, False], ids=["own switch", "common switch"])
    def test_a_switch_turns_it_off_at_run_time(self, op: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        name = environment.switch_of(op) if own else environment.DISABLE
        before = library_reasons(op)
        monkeypatch.setenv(name, "1")
        assert library_reasons(op) == [f"turned off by {name}=1", *before]
        others = [other for other in OPS if other != op and library_reasons(other) != before]
        assert others == ([] if own else [other for other in OPS if other != op])
        monkeypatch.delenv(name)
        assert library_reasons(op) == before

    def test_the_reference_stands_behind_the_list(self, op: str) -> None:
        arguments = FIRST[op].arguments(torch.float64)
        assert all(row.reasons(*arguments) for row in backends_of(op))
        answer = run(lambda *_: "the op", backends_of(op), lambda *_: "the reference", arguments, operands=())
        assert answer == "the reference"


def test_the_op_is_called_where_any_backend_can_run_it() -> None:
    def answer(x: torch.Tensor, *rows: Backend) -> str:
        return run(lambda _: "the op", rows, lambda _: "the reference", (x,), operands=())

    even, never = Backend("even", lambda x: ["odd"] if len(x) % 2 else []), Backend("never", lambda x: ["never"])
    assert answer(torch.ones(2), even, never) == answer(torch.ones(2), never, even) == "the op"
    assert answer(torch.ones(3), even, never) == answer(torch.ones(2)) == "the reference"


def test_every_tensor_is_looked_at_and_absent_ones_are_not() -> None:
    x, weight, scale, *others = FIRST["dwconv_bn_act"].arguments(torch.bfloat16)
    reasons = _cpp_reasons("dwconv_bn_act", (x, weight.double(), None, *others))
    assert reasons == [*native.reasons(), "`weight` is float64; the C++ kernels take float32, bfloat16 and float16"]
    reasons = _cpp_reasons("dwconv_bn_act", (x, weight, scale.to("meta"), *others))
    assert reasons == [*native.reasons(), "`scale` is on meta; the C++ kernels run on cpu"]


def test_every_op_has_a_switch() -> None:
    named = {op for op in REFERENCES if not op.endswith("_backward")} - {"prepack"}
    assert named == {*environment.OPS, *environment.TRAINING_OPS}


#: on a GPU, `mobile_attention` is a chain of the others
WITH_TRITON = [op for op in environment.OPS if op != "mobile_attention"]


@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_op_has_a_triton_kernel_that_says_why_it_does_not_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in backends_of(op) if row.name == "triton")
    x, wide = torch.ones(1, 8, 2, 2), torch.ones(1, 4, 4)
    reasons = row.reasons(x, *[wide] * 8)
    assert reasons == [*cuda.reasons(), "the tensors are on cpu; the Triton kernels run on cuda"]
    monkeypatch.setenv(environment.switch_of(op), "1")
    assert row.reasons(x, *[wide] * 8) == [f"turned off by {environment.switch_of(op)}=1", *reasons]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("op", WITH_TRITON)
def test_every_op_is_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mnv4_kernels::{op}", "CUDA")


def test_a_compiled_graph_asks_every_backend_without_a_break() -> None:
    query, key, value, heads, scale = FIRST["mqa"].arguments(torch.float64)

    def attention(query: torch.Tensor) -> torch.Tensor:
        return functional.mqa(query, key, value, heads=heads, scale=scale)

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query), attention(query))


def test_no_tier_is_unknown_to_the_tests() -> None:
    if not native.available():
        pytest.skip("; ".join(native.reasons()))
    assert set(native.module().compiled_tiers()) <= set(testing.KNOWN_TIERS)


def _cpp_reasons(op: str, arguments: tuple) -> list[str]:
    return next(row for row in backends_of(op) if row.name == "cpp").reasons(*arguments)


def _to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, torch.Tensor) else value
