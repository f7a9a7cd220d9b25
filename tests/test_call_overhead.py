"""The benchmark of call overhead: every op is in it, what it times computes something, its kept figures are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from engines import needs_engine

from mnv4_kernels.environment import TRAINING_OPS
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.support import backends_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import call_overhead  # noqa: E402

pytestmark = needs_engine

#: what a call of an op with a C++ kernel may be
COLUMNS = ("kernel", "eval mode", "no_grad", "gradients")
EVALUATED = ("dwconv_bn_act", "pwconv_bn_act", "conv_bn_act", "kv_downsample", "mqa", "head")


def test_every_op_of_the_cpu_is_timed_in_every_way() -> None:
    calls = call_overhead.op_calls()
    for op in (*EVALUATED, *TRAINING_OPS):
        assert op in REFERENCES
        for column in COLUMNS:
            assert (f"mnv4_kernels::{op}", column) in calls
    assert all("cpp" in [row.name for row in backends_of(op)] for op in EVALUATED)


def test_all_ways_to_call_an_op_give_the_same_and_gradients_only_where_asked() -> None:
    calls = call_overhead.op_calls()
    for row in {row for row, _ in calls}:
        results = {}
        for (name, column), (call, mode) in calls.items():
            if name == row:
                with mode():
                    found = call()
                results[column] = found[0] if isinstance(found, (tuple, list)) else found
        first, *others = results.values()
        assert all(torch.equal(first, other) for other in others), row
        assert {column for column, result in results.items() if result.requires_grad} >= {"gradients"}
        assert not any(results[column].requires_grad for column in COLUMNS[:3])


def test_a_table_has_a_figure_for_each_call_and_names_what_is_over_budget() -> None:
    calls = call_overhead.op_calls()
    table = call_overhead.measured(calls, rounds=1, number=1)
    assert {(row, column) for row, columns in table.items() for column in columns} == calls.keys()
    assert "mnv4_kernels::head" in call_overhead.text("Ops", table)
    for row in table.values():
        row["eval mode"] = 1.0
    assert call_overhead.over_budget(table) == []
    table["mnv4_kernels::head"]["eval mode"] = 1.5 + call_overhead.BUDGET
    assert call_overhead.over_budget(table) == ["mnv4_kernels::head: 2.5 us above aten::relu in eval mode"]


def test_triton_ops_are_timed_up_to_the_launch() -> None:
    pytest.importorskip("triton")
    calls = call_overhead.triton_calls()
    assert {row for row, _ in calls} == {f"mnv4_kernels::{op}" for op in EVALUATED}
    for call, _ in calls.values():
        _, launches = call()
        assert launches


@pytest.mark.parametrize(
    "file", sorted((ROOT / "benchmarks" / "results" / "calls").glob("*.json")), ids=lambda p: p.stem
)
def test_kept_figures_are_of_all_calls(file: Path) -> None:
    kept = json.loads(file.read_text())
    assert {row for row, _ in call_overhead.op_calls()} <= kept["ops"].keys()
    assert all(value > 0 for row in kept["ops"].values() for value in row.values())
    assert kept["provenance"]["cpu"]
