"""The process of a torch runtime, and of what a measurement needs besides: references, exports, ceilings."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .case import DTYPES, Case, create_input, create_model
from .ceilings import measure_ceilings
from .flops import count_flops, least_bytes
from .foreign.player import Answer, Turns, check, forget_peak, serve
from .runtimes import Foreign, Run, select
from .training_step import TrainingStep

#: What runtimes that read a file are converted from.
PROGRAM = "model.pt2"


def prepare(case: Case, folder: Path, export: bool) -> Answer:
    """Writes what is not in `folder` yet: the input, eager's outputs that runtimes must reproduce, the program."""
    model, x = create_model(case), create_input(case)
    answer = {
        "flops": count_flops(model, tuple(x.shape), case.train),
        "bytes": least_bytes(model, x.numel(), (torch.float32 if case.train else DTYPES[case.dtype]).itemsize),
    }
    if export and not (folder / PROGRAM).exists():
        torch.export.save(torch.export.export(model, (x,)), folder / "partial.pt2")
        (folder / "partial.pt2").rename(folder / PROGRAM)
    if not (folder / "float64.npy").exists():
        np.save(folder / "x.npy", x.numpy())
        np.save(folder / "float32.npy", expected(case, model, x).numpy())
        # written last: where it exists, the others do
        np.save(folder / "float64.npy", expected(case, create_model(case).double(), x.double()).numpy())
    if case.train:
        model = create_model(case)
        answer["earned"] = judge(TrainingStep(model, model, x, DTYPES[case.dtype]), folder)["error"]
    return answer


def judge(step: TrainingStep, folder: Path) -> Answer:
    """The errors of a step's gradients, as norms, relative to eager float64 and to eager float32."""
    found = step.gradients().numpy()

    def error(name: str) -> float:
        wanted = np.load(folder / f"{name}.npy")
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    return {"error": error("float64"), "error_float32": error("float32")}


def expected(case: Case, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What runtimes must reproduce: the output, or the gradients of the first step."""
    return TrainingStep(model, model, x, x.dtype).gradients() if case.train else model(x)


def build(case: Case, name: str, folder: Path, turns: Turns) -> Answer:
    """Builds the runtime for `turns`; the errors of its first output and the MB that building took."""
    (runtime,) = select([name])
    assert not isinstance(runtime.how, Foreign), "what reads a file has a player"
    x = torch.from_numpy(np.load(folder / "x.npy"))
    for module in runtime.imports:
        importlib.import_module(module)
    # timm's initialisation and an eager pass leave code and buffers in the process, more than a small network's weights
    create_model(case)
    turns.start()
    if case.train:
        assert runtime.trainer is not None, "what can't train is not selected"
        step = TrainingStep(*runtime.trainer(_given(case), x), DTYPES[case.dtype])
        answer = {**judge(step, folder), **turns.built(step)}
        return {**answer, "saved_mb": step.saved_mb()}
    run: Run = runtime.how(_given(case), x, DTYPES[case.dtype])
    return {**check(run().float().numpy(), folder), **turns.built(run)}


def _given(case: Case) -> nn.Module:
    """What a runtime is made of: its own memory counts, what making it took at most does not."""
    model = create_model(case)
    forget_peak()
    return model


def main() -> None:
    """Serves the jobs of `rounds.Worker`."""
    turns = Turns()

    def on_case(job: dict[str, Any]) -> Case:
        case = Case(**job["case"])
        torch.set_num_threads(case.threads)
        return case

    def ceilings(job: dict[str, Any]) -> Answer:
        case = on_case(job)
        return asdict(measure_ceilings(DTYPES[case.dtype], case.threads, job["traffic"]))

    with torch.no_grad():
        serve(
            {
                "prepare": lambda job: prepare(on_case(job), Path(job["folder"]), job["export"]),
                "build": lambda job: build(on_case(job), job["runtime"], Path(job["folder"]), turns),
                "ceilings": ceilings,
                "time": lambda job: turns.turn(job["seconds"]),
            }
        )


if __name__ == "__main__":
    main()
