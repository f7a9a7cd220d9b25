"""bench: times models in every runtime, one process each, beside the roofline."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..tables import paragraph
from ..tables import render as table
from .arguments import add_case_arguments, cases_of, duration, input_file, output_file, positive_int
from .console import progress

if TYPE_CHECKING:
    from ..benchmark.report import CaseResult
    from ..benchmark.rounds import Protocol

#: `--json`'s word for standard output
STDOUT = Path("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, protocol and outputs."""
    from ..benchmark.environments import FOLDER
    from ..benchmark.runtimes import RUNTIMES

    add_case_arguments(parser, several=True)
    names = [runtime.name for runtime in RUNTIMES]
    parser.add_argument(
        "--runtimes", nargs="+", choices=names, metavar="NAME", help=f"among: {', '.join(map(repr, names))}"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="turns of each runtime (default 7)")
    parser.add_argument("--seconds", type=duration, default=0.3, metavar="S", help="length of a turn (default 0.3)")
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write everything, with provenance, after each case; - for stdout",
    )
    parser.add_argument("--html", type=output_file, metavar="FILE", help="write a page with tables and a plot")
    parser.add_argument("--markdown", type=output_file, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that are in --json FILE, measure the others"
    )
    parser.add_argument("--minutes", type=duration, metavar="M", help="start no case later than this; --resume goes on")
    parser.add_argument(
        "--against",
        type=input_file,
        metavar="FILE",
        help="status 3 if a ratio to a competitor is below that of FILE's, intervals apart",
    )
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep references and converted models for other runs")
    parser.add_argument("--prepare", action="store_true", help="only fill --cache DIR, time nothing")
    parser.add_argument(
        "--train", action="store_true", help="a training step: forward, backward, optimizer; below float32 by autocast"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where the optimized network's time goes: per block and per step"
    )
    parser.add_argument(
        "--environments", metavar="DIR", type=Path, default=FOLDER, help=f"of the competitors (default {FOLDER})"
    )


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints a table per case; status 1 if one of ours failed or was wrong, 3 on a regression."""
    from ..benchmark import markdown, page
    from ..benchmark.report import Report, provenance, regressions
    from ..benchmark.rounds import Protocol, measure
    from ..benchmark.runtimes import select

    to_stdout = arguments.json == STDOUT
    file = None if to_stdout else arguments.json
    if arguments.resume and file is None:
        raise ValueError("`--resume` needs --json FILE, which has the cases to keep")
    protocol = Protocol(arguments.rounds, arguments.seconds, arguments.environments, arguments.cache)
    runtimes = select(arguments.runtimes, arguments.train)
    if arguments.train and arguments.profile:
        raise ValueError("`--profile` takes an optimized network apart, which does not train; leave out --train")
    if arguments.profile:
        return _profile(arguments, protocol)
    if arguments.prepare:
        return _prepare(arguments, protocol)
    before = Report.read(arguments.against) if arguments.against else None
    report = Report.read(file) if arguments.resume and file and file.exists() else Report([], provenance())
    end = float("inf") if arguments.minutes is None else time.monotonic() + arguments.minutes * 60
    status = 0
    with progress() as show:
        for case in cases_of(arguments):
            if report.has(case, [runtime.name for runtime in runtimes]):
                continue
            if time.monotonic() > end:
                print(f"stopped before {case.title}: --minutes are over", file=sys.stderr)
                break
            result = measure(case, runtimes, protocol, show)
            report.add(result)
            if file:
                report.write(file)
            if not to_stdout:
                print_result(result)
            if result.broken():
                status = 1
    if to_stdout:
        print(json.dumps(report.as_dict(), indent=1))
    if file:
        print(f"wrote {file}", file=sys.stderr)
    _write(arguments.html, lambda: page.render(report))
    _write(arguments.markdown, lambda: markdown.render(report))
    if before:
        lost = regressions(report, before)
        print("\n".join(paragraph(f"slower: {line}") for line in lost) or "no regression", file=sys.stderr)
        status = status or (3 if lost else 0)
    return status


def _prepare(arguments: argparse.Namespace, protocol: Protocol) -> int:
    from ..benchmark.rounds import prepare
    from ..benchmark.runtimes import select

    if protocol.cache is None:
        raise ValueError("`--prepare` needs --cache DIR, which it fills")
    failed = False
    with progress() as show:
        for case in cases_of(arguments):
            rows = prepare(case, select(arguments.runtimes, arguments.train), protocol, show)
            for row in rows:
                if row.missing and row.missing.startswith("failed"):
                    print(f"{case.title}: {row.name}: {row.missing}", file=sys.stderr)
                    failed = True
    return int(failed)


def _profile(arguments: argparse.Namespace, protocol: Protocol) -> int:
    from ..benchmark import markdown, profile_page
    from ..benchmark.profiling import profile

    with progress() as show:
        profiles = [profile(case, protocol=protocol, progress=show) for case in cases_of(arguments)]
    to_stdout = arguments.json == STDOUT
    for found in [] if to_stdout else profiles:
        print(f"\n{table(f'{found.case.title}: steps', *found.step_table())}")
        print(f"\n{table(f'{found.case.title}: blocks', *found.block_table())}")
        print(paragraph(found.footnote()))
    if arguments.json:
        text = json.dumps([dataclasses.asdict(found) for found in profiles], indent=1)
        if to_stdout:
            print(text)
        else:
            arguments.json.write_text(text + "\n")
    _write(arguments.html, lambda: profile_page.render(profiles))
    _write(arguments.markdown, lambda: markdown.render_profiles(profiles))
    return 0


def _write(file: Path | None, render: Callable[[], str]) -> None:
    if file:
        file.write_text(render())
        print(f"wrote {file}", file=sys.stderr)


def print_result(result: CaseResult) -> None:
    """A case's table, what is missing, the roofline it refers to, and who leads."""
    head, rows = result.table()
    print(f"\n{table(result.case.title, head, rows)}")
    for line in [*result.absent(), result.roofline(), result.lead()]:
        print(paragraph(line))
