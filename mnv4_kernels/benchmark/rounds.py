"""Conducts a measurement: all runtimes wait but one, and the turns interleave.

Times on a shared machine drift by tens of per cent within an hour, and the OpenMP workers
of one runtime spin while another is timed. So every runtime has a process of its own,
a pause comes before each turn, and what is compared was measured within the same round.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import DTYPES, Case
from .report import CaseResult, Row
from .runtimes import Runtime

#: Seconds of silence before a turn, in which the previous runtime's threads go to sleep.
PAUSE = 0.2

#: Where workers import this package from: `python -m` looks into the working directory first, and in a checkout that
#: is the sources, without the library that an installed copy has.
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

#: Largest relative error with which a runtime is still timed.
GATES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


class WorkerError(RuntimeError):
    """A worker answered with an error, or died."""


class Worker:
    """A process that does one job at a time."""

    def __init__(self, case: Case) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
        self._case = dataclasses.asdict(case)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mnv4_kernels.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=PACKAGE_ROOT,
        )

    def ask(self, job: str, **details: Any) -> dict[str, Any]:
        """The answer to `job`; raises `WorkerError`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"job": job, "case": self._case, **details}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process died: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.wait()}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def measure(
    case: Case,
    runtimes: list[Runtime],
    rounds: int = 7,
    seconds: float = 0.3,
    progress: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Measures `case` in every one of `runtimes`.

    Args:
        case: model, input and threads.
        runtimes: the competitors; those that can't run here appear in the result with the reason.
        rounds: turns of each runtime.
        seconds: of one turn, at least three calls.
        progress: called with what is being done.

    Raises:
        WorkerError: the model itself can't be created or run.
    """
    case = case.resolved()
    workers: dict[str, Worker] = {}
    rows = [Row(runtime.name, ours=runtime.ours) for runtime in runtimes]
    with tempfile.TemporaryDirectory() as folder:
        machine = Worker(case)
        try:
            progress(f"{case.title}: reference in float64")
            facts = machine.ask("prepare", folder=folder)
            ceilings = [machine.ask("ceilings", traffic=facts["bytes"])]
            for runtime, row in zip(runtimes, rows, strict=True):
                progress(f"{case.title}: building {runtime.name}")
                worker = _build(case, runtime, row, folder)
                if worker is not None:
                    workers[runtime.name] = worker
            timed = [row for row in rows if row.name in workers]
            for turn in range(rounds if timed else 0):
                progress(f"{case.title}: round {turn + 1} of {rounds}")
                # another order each round: no runtime always follows the same neighbour
                for row in timed[turn % len(timed) :] + timed[: turn % len(timed)]:
                    time.sleep(PAUSE)
                    row.rounds.append(workers[row.name].ask("time", seconds=seconds)["ms"])
            ceilings.append(machine.ask("ceilings", traffic=facts["bytes"]))
        finally:
            for worker in (machine, *workers.values()):
                worker.close()
    best = {key: max(reading[key] for reading in ceilings) for key in ("gflops", "gbytes", "source")}
    return CaseResult(case=case, flops=facts["flops"], bytes=facts["bytes"], rows=rows, **best)


def _build(case: Case, runtime: Runtime, row: Row, folder: str) -> Worker | None:
    missing = runtime.missing(DTYPES[case.dtype])
    if missing:
        row.missing = "; ".join(missing)
        return None
    worker = Worker(case)
    try:
        row.error = worker.ask("build", runtime=runtime.name, folder=folder)["error"]
    except WorkerError as failure:
        row.missing = f"failed: {failure}"
    else:
        if row.error <= GATES[case.dtype]:
            return worker
        row.missing = f"wrong: relative error {row.error:.1e}"
    worker.close()
    return None
