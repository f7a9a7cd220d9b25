"""Options of the op suite, and a table per op below pytest-benchmark's."""

from __future__ import annotations

import os
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from competitors import COMPETITORS, OURS, competitors_of
from op_cases import heaviest_cases, op_cases
from shapes import FOLDER

from mnv4_kernels.backends import device
from mnv4_kernels.benchmark import markdown
from mnv4_kernels.benchmark.report import provenance
from mnv4_kernels.tables import render

#: Whose heaviest call of each op is timed where no model is named: it makes all six.
DEFAULT_MODEL = "hybrid_medium"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: (op, case, dtype) -> competitor -> median seconds
Medians = dict[tuple[str, str, str], dict[str, float]]
MEDIANS: pytest.StashKey[Medians] = pytest.StashKey()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One at a time: what is timed has the machine to itself."""
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mnv4_kernels ops")
    models = sorted(path.stem for path in FOLDER.glob("*.csv"))
    group.addoption(
        "--model",
        action="append",
        choices=[*models, "all"],
        help=f"time all its calls, may be repeated (default: the heaviest call of each op of {DEFAULT_MODEL})",
    )
    group.addoption("--dtype", action="append", choices=list(DTYPES), help="may be repeated (default: both)")
    group.addoption("--competitor", action="append", choices=list(COMPETITORS), help="may be repeated (default: all)")
    group.addoption("--batch", type=int, default=1, help="images (default 1)")
    group.addoption("--threads", type=int, default=device.usable_cpus(), help="(default: all cores)")
    group.addoption(
        "--memory",
        choices=["warm", "cold"],
        default="warm",
        help="warm: calls follow each other; cold: 256 MiB are written before each (default warm)",
    )
    group.addoption("--markdown", type=Path, help="write the tables, and how they were measured, to this file")


@pytest.fixture
def medians(request: pytest.FixtureRequest) -> Medians:
    """What the tables are made of."""
    return request.config.stash[MEDIANS]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEDIANS] = defaultdict(dict)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "competitor" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    models = options.model or []
    if "all" in models:
        models = sorted(path.stem for path in FOLDER.glob("*.csv"))
    cases = op_cases(models, options.batch) if models else heaviest_cases(DEFAULT_MODEL, options.batch)
    wanted = options.competitor or COMPETITORS
    metafunc.parametrize(
        ("case", "dtype", "competitor"),
        [
            pytest.param(case, DTYPES[dtype], competitor, id=f"{case}-{dtype}-{competitor}")
            for case in cases
            for dtype in options.dtype or DTYPES
            for competitor in competitors_of(case.op)
            if competitor in wanted
        ],
    )


def pytest_report_header(config: pytest.Config) -> str:
    options = config.option
    return (
        f"ops: batch {options.batch}, {options.threads} threads, {options.memory} caches, {device.cpu_name()}, "
        f"torch {torch.__version__}, MNV4_KERNELS_TIER {os.environ.get('MNV4_KERNELS_TIER', 'not set')}"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    by_op: dict[str, Medians] = defaultdict(dict)
    for key, medians in config.stash[MEDIANS].items():
        by_op[key[0]][key] = medians
    options = config.option
    tables = []
    for op, rows in by_op.items():
        names = [name for name in competitors_of(op) if any(name in medians for medians in rows.values())]
        title = (
            f"{op}: microseconds (median), batch {options.batch}, {options.threads} threads, {options.memory} caches"
        )
        head = ["case", "dtype", *names, "best other / ours"]
        cells = [[case, dtype, *_cells(names, medians)] for (_, case, dtype), medians in rows.items()]
        tables.append((title, head, cells))
    for table in tables:
        terminalreporter.write_line(f"\n{render(*table)}")
    if options.markdown and tables:
        sections = [markdown.section(title, [markdown.table(head, cells)]) for title, head, cells in tables]
        command = shlex.join(["pytest", *sys.argv[1:]])
        options.markdown.write_text("\n".join([*sections, markdown.origin({**provenance(), "command": command})]))


def _cells(names: list[str], medians: dict[str, float]) -> list[str]:
    others = [seconds for name, seconds in medians.items() if name != OURS]
    ratio = f"{min(others) / medians[OURS]:.2f}x" if others and OURS in medians else ""
    return [*(f"{medians[name] * 1e6:.1f}" if name in medians else "-" for name in names), ratio]
