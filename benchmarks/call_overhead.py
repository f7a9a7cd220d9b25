"""What a call costs beside its arithmetic: each op against aten::relu on the same tensor, and each way to register one.

    python benchmarks/call_overhead.py [--forms] [--json FILE] [--check]

Tensors of one pixel, one thread: what is timed is dispatch, checks and allocation. Rounds go over all calls in turn; a
figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from competitors import PACKED

from mnv4_kernels import ops
from mnv4_kernels.backends import cuda
from mnv4_kernels.benchmark.report import provenance
from mnv4_kernels.environment import TRAINING_OPS
from mnv4_kernels.ops import DIRECT
from mnv4_kernels.tables import render
from mnv4_kernels.testing import Case
from mnv4_kernels.testing.cases import conv, dwconv, head, kv_downsample, mqa, pwconv

#: What an op of eval mode may cost above aten::relu, in microseconds.
BUDGET = 2.0

#: Channels, of one pixel. A whole panel, as in models: a remainder would be copied.
CHANNELS = 16

CASES: tuple[Case, ...] = (
    dwconv(CHANNELS, (1, 1), act="relu"),
    pwconv(CHANNELS, CHANNELS, (1, 1), act="relu"),
    conv(CHANNELS, CHANNELS, (1, 1), act="relu"),
    kv_downsample(CHANNELS, CHANNELS, CHANNELS, (1, 1)),
    mqa(1, CHANNELS, CHANNELS, 1, (1, 1)),
    head(CHANNELS, CHANNELS, CHANNELS, (1, 1)),
)

#: where an op's scales are among its arguments; packed weights contain them
SCALES = {"kv_downsample": (2, 6), "mqa": ()}

#: Microseconds of calls by what they are and how they are made.
Table = dict[str, dict[str, float]]
Call = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


def plan_arguments(case: Case) -> tuple[Any, ...]:
    """The op's arguments as a plan gives them: weights packed, with the scale inside."""
    arguments = case.arguments(layout="channels_last")
    scales = SCALES.get(case.op, (2,))
    return *(None if i in scales else value for i, value in enumerate(arguments)), *PACKED[case.op](arguments)


def training_arguments(name: str) -> tuple[Any, ...]:
    """The arguments of a training op: x normalised by four vectors, a weight where it convolves."""
    x = torch.randn(1, CHANNELS, 1, 2).contiguous(memory_format=torch.channels_last)
    norm = (torch.randn(CHANNELS), *(torch.rand(CHANNELS) + 0.5 for _ in range(3)))
    geometry: tuple[Any, ...] = ([1, 1], [1, 1, 1, 1], [1, 1])
    tails: dict[str, tuple[Any, ...]] = {
        "bn_act": (None, None, None),
        "bn_act_pwconv": (torch.randn(CHANNELS, CHANNELS, 1, 1), True),
        "bn_act_dwconv": (torch.randn(CHANNELS, 1, 3, 3), *geometry, True),
        "bn_act_conv": (torch.randn(CHANNELS, CHANNELS, 3, 3), *geometry, True, False),
    }
    return (x, *norm, 1e-5, "relu", *tails[name])


def calls_of(op: Any, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Call]]:
    """(column, the op's call in that way, under what it is made)."""
    first, *rest = arguments
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    kernel = torch.library.get_kernel(op, "CPU")
    yield "kernel", (functools.partial(kernel.call_boxed, keys, *arguments), torch.no_grad)
    # what plans do; under torch.inference_mode() it is the same
    yield "eval mode", (functools.partial(op, *arguments), torch._C._AutoDispatchBelowAutograd)
    yield "no_grad", (functools.partial(op, *arguments), torch.no_grad)
    yield "gradients", (functools.partial(op, first.detach().requires_grad_(), *rest), nullcontext)


def op_calls() -> dict[tuple[str, str], Call]:
    """Every (op, column)."""
    x = torch.randn(1, CHANNELS, 1, 1).contiguous(memory_format=torch.channels_last)
    found: dict[tuple[str, str], Call] = {}
    rows: list[tuple[Any, tuple[Any, ...]]] = [(torch.ops.aten.relu.default, (x,))]
    rows += [(getattr(ops, case.op), plan_arguments(case)) for case in CASES]
    rows += [(getattr(ops, name), training_arguments(name)) for name in TRAINING_OPS]
    for op, arguments in rows:
        name = op._schema.name
        for column, call in calls_of(op, arguments):
            found[name, column] = call
        direct = DIRECT.get(name.partition("::")[2])
        if direct is not None:
            first, *rest = arguments
            call = functools.partial(direct, first.detach().requires_grad_(), *rest)
            found[name, "function"] = (call, nullcontext)
    return found


def triton_calls() -> dict[tuple[str, str], Call]:
    """What a Triton op does in Python before the launch: allocation, layout, choice of a configuration."""
    found: dict[tuple[str, str], Call] = {}
    for case in CASES:
        module = importlib.import_module(cuda.kernel(case.op).__module__)
        found[f"mnv4_kernels::{case.op}", "Triton before the launch"] = (
            functools.partial(module.build, *case.arguments(layout="channels_last")),
            torch.no_grad,
        )
    return found


def measured(calls: dict[tuple[str, str], Call], rounds: int, number: int) -> Table:
    """Microseconds a call, the median of `rounds` of `number` calls each."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for round_ in range(rounds + 1):
        for key, (call, mode) in calls.items():
            with mode():
                seconds = timeit.timeit(call, number=number)
            # the first round warms up
            if round_:
                times[key].append(seconds / number * 1e6)
    table: Table = {}
    for (row, column), values in times.items():
        table.setdefault(row, {})[column] = statistics.median(values)
    return table


def text(title: str, table: Table) -> str:
    """`table` for people."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [
        [name, *(f"{row[column]:.1f}" if column in row else "" for column in columns)] for name, row in table.items()
    ]
    return render(title, ["microseconds a call", *columns], rows)


def over_budget(table: Table) -> list[str]:
    """Ops of eval mode that cost more above aten::relu than they may, in words."""
    relu = table["aten::relu"]["eval mode"]
    evaluated = {f"mnv4_kernels::{case.op}" for case in CASES}
    return [
        f"{name}: {row['eval mode'] - relu:.1f} us above aten::relu in eval mode"
        for name, row in table.items()
        if name in evaluated and row["eval mode"] > relu + BUDGET
    ]


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", action="store_true", help="also ways to register a kernel (compiles C++: a minute)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--check", action="store_true", help="fail if an op of eval mode costs too much")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--number", type=int, default=2000, help="calls a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"ops": measured({**op_calls(), **triton_calls()}, options.rounds, options.number)}
    print(text("Ops", tables["ops"]))
    if options.forms:
        from call_forms import forms

        tables["forms"] = measured(forms(CHANNELS), options.rounds, options.number)
        print("\n" + text("Ways to register one kernel of pwconv_bn_act's schema that only allocates", tables["forms"]))
    if options.json is not None:
        options.json.write_text(json.dumps({"provenance": provenance(), **tables}, indent=1) + "\n")
    over = over_budget(tables["ops"])
    print("\n".join(over))
    return int(options.check and bool(over))


if __name__ == "__main__":
    sys.exit(main())
