"""Runs one network when told to: the job loop of every competitor's process, and the runtimes that read a file.

Speaks JSON lines: reads ``{"job": ...}`` on stdin, answers on what was stdout when it started. Whatever a
runtime prints goes to stderr instead. Run by path, it serves runtimes that read an exported file; the worker of
the torch runtimes imports the loop from here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: Runs the network once and returns its output.
Play = Callable[[], Any]
Answer = dict[str, Any]
Job = Callable[[dict[str, Any]], Answer]

#: Where Linux tells the energy that a processor package has used, in microjoules.
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def serve(jobs: dict[str, Job]) -> None:
    """Answers jobs by name until stdin ends; an exception is the answer `failed`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = jobs[job["job"]](job)
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def resident() -> tuple[float, float] | None:
    """MB that the process holds in memory, and the most it has held since `forget_peak`; None where not told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return kilobytes["VmRSS"] / 1e3, kilobytes["VmHWM"] / 1e3


def forget_peak() -> None:
    """Gives freed memory back and lets the peak of `resident` start anew."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        # another C library or another kernel: the peak then includes what building took
        return


def relative_error(output: Any, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude expected."""
    difference = np.abs(np.asarray(output, dtype=np.float64) - expected).max()
    return float(difference / np.abs(expected).max())


def check(output: Any, folder: Path) -> Answer:
    """The output's errors relative to eager float64 and to eager float32."""
    return {
        "error": relative_error(output, np.load(folder / "float64.npy")),
        "error_float32": relative_error(output, np.load(folder / "float32.npy").astype(np.float64)),
    }


class Turns:
    """Times a network, and what memory it holds beyond what the process held at `start`."""

    def __init__(self) -> None:
        self._play: Play | None = None
        self._start: float | None = None

    def start(self) -> None:
        """Call after the runtime's imports and before the network is loaded."""
        forget_peak()
        now = resident()
        self._start = None if now is None else now[0]

    def built(self, play: Play) -> Answer:
        """Keeps what is to be timed; tells the MB that loading took at most."""
        self._play = play
        now = resident()
        loading = None if now is None or self._start is None else now[1] - self._start
        forget_peak()
        return {"loading_mb": loading}

    def turn(self, seconds: float) -> Answer:
        """An untimed call, then calls for about `seconds`, at least three: quartiles in milliseconds, MB and joules."""
        play = self._play
        assert play is not None, "a runtime is timed after it is built"
        play()
        times: list[float] = []
        joules = energy()
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            play()
            times.append((time.perf_counter() - start) * 1e3)
        spent = energy()
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        now = resident()
        return {
            "turn": {
                "calls": len(times),
                "minimum": round(min(times), 5),
                "lower": round(lower, 5),
                "median": round(median, 5),
                "upper": round(upper, 5),
                "joules": None if joules is None or spent is None else (spent - joules) / len(times),
            },
            "memory_mb": None if now is None or self._start is None else now[1] - self._start,
        }


def energy() -> float | None:
    """Joules that the processor's package has used so far; None where the machine does not tell."""
    try:
        return int(ENERGY.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _onnxruntime(path: str, x: np.ndarray, threads: int, dtype: str, start: Callable[[], None]) -> Play:
    import onnxruntime

    start()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


def onnxruntime_steps(path: str, x: np.ndarray, threads: int, repeats: int) -> list[tuple[str, float]]:
    """Each node's name and the median of its microseconds, in order of execution."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        for _ in range(repeats):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            times.setdefault(name.removesuffix("_kernel_time"), []).append(event["dur"])
    return [(name, statistics.median(values)) for name, values in times.items()]


def _openvino(path: str, x: np.ndarray, threads: int, dtype: str, start: Callable[[], None]) -> Play:
    import openvino

    start()
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()

    def play() -> Any:
        request.infer([x], share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return play


def _executorch(path: str, x: np.ndarray, threads: int, dtype: str, start: Callable[[], None]) -> Play:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    start()
    torch.set_num_threads(threads)
    portable_lib._unsafe_reset_threadpool(threads)
    forward = Runtime.get().load_program(path).load_method("forward")
    inputs = (torch.from_numpy(x),)
    return lambda: forward.execute(inputs)[0]


def _litert(path: str, x: np.ndarray, threads: int, dtype: str, start: Callable[[], None]) -> Play:
    from ai_edge_litert.interpreter import Interpreter

    start()
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def play() -> Any:
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return play


#: name -> (imports the runtime, calls `start`, loads a file; the distribution whose version is reported)
PLAYERS = {
    "onnxruntime": (_onnxruntime, "onnxruntime"),
    "openvino": (_openvino, "openvino"),
    "executorch": (_executorch, "executorch"),
    "litert": (_litert, "ai-edge-litert"),
}


def main() -> None:
    """Serves `build` and `time`."""
    turns = Turns()

    def build(job: dict[str, Any]) -> Answer:
        folder, case = Path(job["folder"]), job["case"]
        load, distribution = PLAYERS[job["runtime"]]
        x = np.load(folder / "x.npy")
        play = load(str(folder / job["file"]), x, case["threads"], case["dtype"], turns.start)
        answer = {**check(play(), folder), "version": importlib.metadata.version(distribution)}
        return {**answer, **turns.built(play)}

    def profile(job: dict[str, Any]) -> Answer:
        folder = Path(job["folder"])
        x = np.load(folder / "x.npy")
        path = str(folder / job["file"])
        return {"steps": onnxruntime_steps(path, x, job["case"]["threads"], job["repeats"])}

    serve({"profile": profile, "build": build, "time": lambda job: turns.turn(job["seconds"])})


if __name__ == "__main__":
    main()
