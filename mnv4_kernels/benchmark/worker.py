"""One competitor's process: builds its runtime, is checked, then runs when told to.

Speaks JSON lines: reads ``{"job": ...}`` on stdin, answers on what was stdout when it
started. Whatever a runtime prints goes to stderr instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .case import DTYPES, Case, create_input, create_model
from .ceilings import measure_ceilings
from .flops import count_flops, least_bytes
from .runtimes import Run, select


def prepare(case: Case, folder: Path) -> dict[str, Any]:
    """Writes the weights, the input and eager float64's output, which every runtime must reproduce."""
    model, x = create_model(case), create_input(case)
    flops = count_flops(model, tuple(x.shape))
    floor_bytes = least_bytes(model, x.numel(), DTYPES[case.dtype].itemsize)
    torch.save({"state": model.state_dict(), "x": x}, folder / "given.pt")
    expected = model.double()(x.double())
    torch.save(expected, folder / "expected.pt")
    return {"flops": flops, "bytes": floor_bytes}


def build(case: Case, name: str, folder: Path) -> tuple[Run, dict[str, Any]]:
    """The runtime's function, and the error of its first output."""
    given = torch.load(folder / "given.pt")
    model = create_model(case)
    model.load_state_dict(given["state"])
    (runtime,) = select([name])
    run = runtime.build(model, given["x"], DTYPES[case.dtype])
    return run, {"error": relative_error(run(), torch.load(folder / "expected.pt"))}


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude expected."""
    difference = (output.double() - expected).abs().max()
    return float(difference / expected.abs().max())


def time_turn(run: Run, seconds: float) -> dict[str, Any]:
    """One turn: an untimed call, then calls for about `seconds`, at least three; milliseconds each."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": times}


def main() -> None:
    """Serves the jobs of `rounds.Worker` until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run: Run | None = None
    with torch.no_grad():
        for line in sys.stdin:
            job = json.loads(line)
            try:
                case = Case(**job["case"])
                torch.set_num_threads(case.threads)
                answer: dict[str, Any]
                if job["job"] == "prepare":
                    answer = prepare(case, Path(job["folder"]))
                elif job["job"] == "build":
                    run, answer = build(case, job["runtime"], Path(job["folder"]))
                elif job["job"] == "ceilings":
                    answer = asdict(measure_ceilings(DTYPES[case.dtype], case.threads, job["traffic"]))
                else:
                    assert run is not None, "a runtime is timed after it is built"
                    answer = time_turn(run, job["seconds"])
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
