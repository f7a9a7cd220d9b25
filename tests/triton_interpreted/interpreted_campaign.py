"""The campaign's stages and the tuner with real launches, interpreted, and a stand-in for `torch.cuda`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the shapes are read off timm's models")

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

import gpu_device  # noqa: E402
import gpu_worker  # noqa: E402
from gpus import interpret, stand_in  # noqa: E402

from mnv4_kernels import tuned  # noqa: E402
from mnv4_kernels.engine import gpu  # noqa: E402
from mnv4_kernels.engine.graphs import CudaRecorder  # noqa: E402
from mnv4_kernels.ops.gpu import tune  # noqa: E402
from mnv4_kernels.testing import CASES  # noqa: E402


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    # what eager resizes is filled with NaN by `_poisoned_memory` otherwise, which takes longer than the kernels
    torch.use_deterministic_algorithms(False)
    stand_in(monkeypatch)
    interpret(monkeypatch)
    monkeypatch.setattr(gpu.GraphedNetwork, "_recorder", lambda network: CudaRecorder(network.device))
    monkeypatch.setattr(gpu_device.Gpu, "device", "cpu")
    monkeypatch.setattr(gpu_device.Gpu, "flushed", 1024)
    timed = gpu_device.Gpu.time

    def once(device: Any, run: Callable[[], object], repeats: int = 50) -> Any:
        return timed(device, run, 1)

    monkeypatch.setattr(gpu_device.Gpu, "time", once)


def _stage(out: Path, name: str, *more: str) -> dict[str, Any]:
    options = ["--models", "conv_small_035", "--batches", "1", "--dtypes", "float32", "--size", "32", "--rows", "1"]
    until = ["--until", str(time.monotonic() + 300)]
    status = gpu_worker.main(["--stage", name, "--out", str(out), *until, *options, *more])
    rows = json.loads((out / "campaign.json").read_text())[name]
    assert status == 0, rows
    return rows


@pytest.mark.parametrize("name", ["correctness", "depthwise", "kernels", "plans"])
def test_a_stage_launches_checks_and_times(name: str, tmp_path: Path) -> None:
    (row,) = _stage(tmp_path, name).values()
    assert "error" not in row


def test_the_sweep_tries_the_neighbours_of_a_config_and_notes_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all of them would take the interpreter minutes
    monkeypatch.setattr(tune, "neighbours", lambda config, all_of=tune.neighbours: all_of(config)[:2])
    (row,) = _stage(tmp_path, "sweep").values()
    assert all(not found["failures"] for found in row["configs"].values())
    _, configs = tuned.read(tmp_path / "tuned.json")
    assert set(configs) == set(row["configs"])


def test_the_tuner_times_candidates_and_drops_those_that_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.op == "dwconv_bn_act")
    call = (case.op, case.arguments(layout="channels_last"))
    ((key, first),) = tune.build(call, {})[2].items()
    monkeypatch.setattr(tune, "candidates", lambda config, all_of=tune.candidates: all_of(config)[:3])
    config, us, failures = tune.best(call, key, first, torch.empty(8))
    assert config in tune.candidates(first)
    assert us == 100.0
    assert failures == []


@pytest.mark.slow
def test_a_whole_model_is_optimized_and_judged(tmp_path: Path) -> None:
    (row,) = _stage(tmp_path, "ours").values()
    assert row["relative_error"] < 1e-4
