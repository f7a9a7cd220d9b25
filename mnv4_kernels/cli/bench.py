"""bench: times models in every runtime, one process each, beside the roofline."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .arguments import add_case_arguments, cases_of
from .console import print_table, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, protocol and outputs."""
    from ..benchmark.runtimes import RUNTIMES

    add_case_arguments(parser, several=True)
    names = [runtime.name for runtime in RUNTIMES]
    parser.add_argument("--runtimes", nargs="+", choices=names, metavar="NAME", help=f"among: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each runtime (default 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default 0.3)")
    parser.add_argument("--json", metavar="FILE", help="write everything, with provenance; - for stdout")
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and a plot")


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints a table per case; status 1 if one of our runtimes gave a wrong result or failed."""
    from ..benchmark.page import render
    from ..benchmark.report import CaseResult, Report, provenance
    from ..benchmark.rounds import measure
    from ..benchmark.runtimes import select

    runtimes = select(arguments.runtimes)
    results: list[CaseResult] = []
    with progress() as show:
        for case in cases_of(arguments):
            results.append(measure(case, runtimes, arguments.rounds, arguments.seconds, show))
    report = Report(results, provenance())
    if arguments.json == "-":
        print(json.dumps(report.as_dict(), indent=1))
    else:
        for result in results:
            print_result(result)
    if arguments.json and arguments.json != "-":
        Path(arguments.json).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        print(f"wrote {arguments.json}", file=sys.stderr)
    if arguments.html:
        Path(arguments.html).write_text(render(report))
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 1 if any(result.broken() for result in results) else 0


def print_result(result: object) -> None:
    """A case's table, the roofline it refers to, and who leads."""
    from ..benchmark.report import CaseResult

    assert isinstance(result, CaseResult)
    head, rows = result.table()
    print()
    print_table(head, rows, result.case.title)
    print(result.roofline())
    print(result.lead())
