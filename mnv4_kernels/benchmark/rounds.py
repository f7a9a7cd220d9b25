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
from .environments import FOLDER
from .kit import ConversionError, Kit
from .report import CaseResult, Row, Turn, made_now
from .runtimes import Foreign, Runtime

#: Seconds of silence before a turn, in which the previous runtime's threads go to sleep.
PAUSE = 0.2

#: Where workers import this package from: `python -m` looks into the working directory first, and in a checkout that
#: is the sources, without the library that an installed copy has.
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

#: Run by path in other environments.
PLAYER = Path(__file__).resolve().parent / "foreign" / "player.py"

#: Largest relative error with which a runtime is still timed.
GATES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}

#: Largest error of a step's gradients, in errors of eager's: batch statistics amplify the roundings before them.
TRAINING_GATE = 2.0


class WorkerError(RuntimeError):
    """A worker answered with an error, or died."""


class Worker:
    """A process that does one job at a time: of this package, or a player in another environment's Python."""

    def __init__(self, case: Case, player: str | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
        command = [sys.executable, "-m", "mnv4_kernels.benchmark.worker"]
        if player is not None:
            command = [player, str(PLAYER)]
            # this interpreter's paths have this interpreter's packages
            environment.pop("PYTHONPATH", None)
        self._case = dataclasses.asdict(case)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command,
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


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How long is measured, and where things are."""

    #: turns of each runtime
    rounds: int = 7
    #: of one turn; at least three calls are made
    seconds: float = 0.3
    #: of the competitors' environments
    environments: Path = FOLDER
    #: where what runtimes read is kept; None: nowhere
    cache: Path | None = None


def measure(
    case: Case,
    runtimes: list[Runtime],
    protocol: Protocol = Protocol(),
    progress: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Measures `case` in every one of `runtimes`.

    Args:
        case: model, input and threads.
        runtimes: the competitors; those that can't run here appear in the result with the reason.
        protocol: rounds and folders.
        progress: called with what is being done.

    Raises:
        WorkerError: the model itself can't be created or run.
    """
    case = case.resolved()
    workers: dict[str, Worker] = {}
    rows = [Row(runtime.name, ours=runtime.ours) for runtime in runtimes]
    machine = Worker(case)
    with Kit(case, protocol.cache) as kit:
        try:
            facts = _prepare(case, runtimes, rows, kit, machine, protocol, progress)
            ceilings = [machine.ask("ceilings", traffic=facts["bytes"])]
            for runtime, row in zip(runtimes, rows, strict=True):
                if row.missing is None:
                    progress(f"{case.title}: building {runtime.name}")
                    gate = TRAINING_GATE * facts["earned"] if case.train else GATES[case.dtype]
                    worker = _build(case, runtime, row, kit.folder, protocol, gate)
                    if worker is not None:
                        workers[runtime.name] = worker
            timed = [row for row in rows if row.name in workers]
            for turn in range(protocol.rounds if timed else 0):
                progress(f"{case.title}: round {turn + 1} of {protocol.rounds}")
                # another order each round: no runtime always follows the same neighbour
                for row in timed[turn % len(timed) :] + timed[: turn % len(timed)]:
                    time.sleep(PAUSE)
                    answer = workers[row.name].ask("time", seconds=protocol.seconds)
                    row.turns.append(Turn(**answer["turn"]))
                    row.memory_mb = answer["memory_mb"]
            ceilings.append(machine.ask("ceilings", traffic=facts["bytes"]))
        finally:
            for worker in (machine, *workers.values()):
                worker.close()
    best = {key: max(reading[key] for reading in ceilings) for key in ("gflops", "gbytes", "source")}
    return CaseResult(case=case, flops=facts["flops"], bytes=facts["bytes"], rows=rows, made=made_now(), **best)


def prepare(
    case: Case, runtimes: list[Runtime], protocol: Protocol, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Writes what `runtimes` read into the cache and times nothing; the rows say what is missing."""
    case = case.resolved()
    rows = [Row(runtime.name, ours=runtime.ours) for runtime in runtimes]
    machine = Worker(case)
    try:
        with Kit(case, protocol.cache) as kit:
            _prepare(case, runtimes, rows, kit, machine, protocol, progress)
    finally:
        machine.close()
    return rows


def _prepare(
    case: Case,
    runtimes: list[Runtime],
    rows: list[Row],
    kit: Kit,
    machine: Worker,
    protocol: Protocol,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    for runtime, row in zip(runtimes, rows, strict=True):
        row.missing = "; ".join(runtime.missing(DTYPES[case.dtype], protocol.environments)) or None
    wanted = [(runtime.how, row) for runtime, row in zip(runtimes, rows, strict=True) if row.missing is None]
    foreign = [(how, row) for how, row in wanted if isinstance(how, Foreign)]
    progress(f"{case.title}: reference in float64")
    facts = machine.ask("prepare", folder=str(kit.folder), export=bool(foreign))
    for how, row in foreign:
        progress(f"{case.title}: {how.file} for {row.name}")
        try:
            kit.convert(how, protocol.environments)
        except ConversionError as error:
            row.missing = f"failed: conversion: {error}"
    return facts


def _build(case: Case, runtime: Runtime, row: Row, folder: Path, protocol: Protocol, gate: float) -> Worker | None:
    details: dict[str, Any] = {"runtime": runtime.name}
    player: str | None = None
    if isinstance(runtime.how, Foreign):
        player = runtime.how.player.python(protocol.environments)
        details = {"runtime": runtime.how.player.name, "file": runtime.how.file}
    worker = Worker(case, player)
    try:
        answer = worker.ask("build", folder=str(folder), **details)
    except WorkerError as failure:
        row.missing = f"failed: {failure}"
    else:
        row.error, row.error_float32 = answer["error"], answer["error_float32"]
        row.loading_mb, row.version = answer["loading_mb"], answer.get("version")
        row.saved_mb = answer.get("saved_mb")
        # not `>`: NaN is wrong too
        if row.error is not None and row.error <= gate:
            return worker
        row.missing = f"wrong: relative error {row.error:.1e}"
    worker.close()
    return None
