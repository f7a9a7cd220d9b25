"""The campaign's control flow without a device: order, budgets, files, resuming, and what a dying kernel costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the shapes are read off timm's models")
pytest.importorskip("triton", reason="Triton is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_campaign
import gpu_device
import gpu_worker
from gpu_campaign import ROOT, STAGES, Results, Stage, parse, supervise
from gpus import pretend

from mnv4_kernels import tuned
from mnv4_kernels.engine import gpu

#: behaves as told by the key of each row; keeps the protocol of a real worker
WORKER = """
import json, os, sys, time
path = os.path.join(sys.argv[sys.argv.index("--out") + 1], "campaign.json")
data = json.load(open(path)) if os.path.exists(path) else {{}}
rows = data.setdefault("stage", {{}})
def save():
    with open(path + ".new", "w") as file:
        json.dump(data, file)
    os.replace(path + ".new", path)
def end(key, row):
    del data["running"]
    rows[key] = row
    save()
for key in {keys!r}:
    if key in rows:
        continue
    data["running"] = ["stage", key]
    save()
    if key == "dies":
        os.kill(os.getpid(), 9)
    if key == "hangs":
        time.sleep(60)
    if key == "poisons":
        end(key, {{"error": "an illegal memory access"}})
        sys.exit(3)
    end(key, {{"us": 1.0}})
    if key == "last in time":
        sys.exit(4)
"""


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *keys: str, seconds: float = 60) -> tuple[str, Any]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(keys=keys))
    monkeypatch.setattr(gpu_campaign, "WORKER", worker)
    arguments = parse(["--out", str(tmp_path), "--dry-run"])
    outcome = supervise(Stage("ceilings", 1.0, row_limit=3.0), arguments, time.monotonic() + seconds)
    return outcome, Results(tmp_path / "campaign.json").data


def test_a_row_that_kills_the_process_is_noted_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, data = _run(tmp_path, monkeypatch, "first", "dies", "last")
    assert outcome == "done"
    assert data["stage"]["dies"]["error"].startswith("died with -")
    assert data["stage"]["first"] == data["stage"]["last"] == {"us": 1.0}
    assert "running" not in data


def test_a_row_that_hangs_is_given_up_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, data = _run(tmp_path, monkeypatch, "first", "hangs", "last")
    assert outcome == "done"
    assert "no answer for" in data["stage"]["hangs"]["error"]
    assert data["stage"]["last"] == {"us": 1.0}


def test_a_device_that_no_longer_answers_gets_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = _run(tmp_path, monkeypatch, "poisons", "last")
    assert data["stage"]["poisons"] == {"error": "an illegal memory access"}
    assert data["stage"]["last"] == {"us": 1.0}


def test_a_stage_that_the_clock_stops_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, data = _run(tmp_path, monkeypatch, "last in time", "never")
    assert outcome == "out of time"
    assert list(data["stage"]) == ["last in time"]


def test_a_row_that_the_clock_cuts_is_left_to_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_campaign, "GRACE", 0.0)
    outcome, data = _run(tmp_path, monkeypatch, "first", "hangs", seconds=1.0)
    assert outcome == "out of time"
    assert "hangs" not in data["stage"]
    assert "running" not in data


def test_a_stage_that_breaks_between_its_rows_is_no_stage_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise ImportError('of something that is not here')")
    monkeypatch.setattr(gpu_campaign, "WORKER", worker)
    arguments = parse(["--out", str(tmp_path), "--dry-run"])
    assert supervise(STAGES[0], arguments, time.monotonic() + 60) == "died with 1"


def test_the_baseline_is_timed_with_the_attention_that_it_was_compiled_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Attending(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = x.flatten(2)[:, :, :, None]
            return torch.nn.functional.scaled_dot_product_attention(query, query[:, :1], query[:, :1])

    grouped: list[bool] = []

    def compiled(device: Any, model: torch.nn.Module, mode: str | None = None) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            grouped.append("enable_gqa = True" in graph.code)
            return graph.forward

        return torch.compile(model, backend=backend)

    monkeypatch.setattr(gpu_device.MadeUp, "compile", compiled)
    monkeypatch.setattr(gpu_worker, "model_of", lambda *_: (Attending(), torch.randn(1, 4, 2, 2)))
    options = ["--models", "hybrid_medium", "--batches", "1", "--dtypes", "float32", "--dry-run"]
    arguments = ["--stage", "baseline", "--out", str(tmp_path), "--until", str(time.monotonic() + 60), *options]
    assert gpu_worker.main(arguments) == 0, Results(tmp_path / "campaign.json").errors()
    assert grouped == [True]


def test_a_stage_that_can_not_start_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(gpu_campaign, "WORKER", worker)
    arguments = parse(["--out", str(tmp_path), "--dry-run"])
    assert supervise(STAGES[0], arguments, time.monotonic() + 60).startswith("died with")


def test_the_stages_are_in_the_order_of_their_value() -> None:
    names = [stage.name for stage in STAGES]
    assert names.index("correctness") < names.index("depthwise") < names.index("ours") < names.index("baseline")
    assert names[-1] == "sweep"


def test_without_a_device_there_is_a_message_and_no_file(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_campaign.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "a CUDA device is needed, or --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_stage_makes_rows_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # restored after the test, whatever the worker makes of them
    pretend(monkeypatch)
    monkeypatch.setattr(gpu.GraphedNetwork, "_recorder", None)
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_worker, "_command", lambda command, *_, **__: commands.append(command) or {"status": 0})
    monkeypatch.setattr(gpu_worker, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    options = ["--models", "conv_small_035", "--batches", "2", "--dtypes", "bfloat16", "--size", "32", "--rows", "2"]
    for stage in STAGES:
        arguments = [
            "--stage",
            stage.name,
            "--out",
            str(tmp_path),
            "--until",
            str(time.monotonic() + 300),
            *options,
            "--dry-run",
        ]
        assert gpu_worker.main(arguments) == 0, Results(tmp_path / "campaign.json").errors()
    data = Results(tmp_path / "campaign.json").data
    assert all(1 <= len(data[stage.name]) <= 2 for stage in STAGES)
    assert (
        data["precompile"]["heuristic configs"] == data["precompile_training"]["heuristic configs"] == {"binaries": 1}
    )
    assert all(row["peak_mib"] == 0.0 and len(row["losses"]) == 3 for row in data["steps"].values())
    _, configs = tuned.read(tmp_path / "tuned.json")
    assert configs
    assert len(commands) == 4


def test_what_another_machine_compiled_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(gpu_worker, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(gpu_worker, "compiled", lambda *_: made.append(1) or (1, []))
    arguments = ["--stage", "precompile", "--out", str(tmp_path), "--models", "conv_small_035"]
    arguments += ["--batches", "2", "--dtypes", "bfloat16", "--until", str(time.monotonic() + 60), "--dry-run"]
    for machine, compilations in (("first", 1), ("first", 1), ("second", 2)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / machine))
        assert gpu_worker.main(arguments) == 0
        assert len(made) == compilations


@pytest.mark.slow
def test_what_the_campaign_gives_pytest_selects_the_tests_that_are_meant() -> None:
    files = {path for path in (ROOT / "tests").glob("test_*.py") if path.name != Path(__file__).name}
    marked = {path.name for path in files if re.search(r"mark\.gpu\b|\bDEVICES\b", path.read_text())}
    assert marked == set(gpu_worker.GPU_TESTS)
    work = SimpleNamespace(arguments=SimpleNamespace(dry_run=True), deadline=0.0)
    commands: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_worker, "_command", lambda command, *_, **__: commands.append(command) or {})
        for _, row in (*gpu_worker.tests(work), *list(gpu_worker.sanitizer(work))[:1]):
            row()
    for command, least in zip(commands, (40, 100, 40, 20, 20), strict=True):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert done.stdout.count("::") >= least, command


def _dry_run(out: Path, *more: str) -> Any:
    script = str(ROOT / "benchmarks" / "gpu_campaign.py")
    command = [sys.executable, script, "--dry-run", "--out", str(out), "--models", "conv_small_035", "--size", "32"]
    # far more than it takes, for what a slow machine leaves out would fail
    command += ["--batches", "2", "--minutes", "30", "--row-limit", "600", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((out / "campaign.json").read_text())


@pytest.mark.slow
def test_a_dry_run_makes_rows_of_every_stage_and_a_second_call_makes_none_again(tmp_path: Path) -> None:
    first = _dry_run(tmp_path / "first")
    for stage in STAGES:
        assert first[stage.name], stage.name
        assert first["calls"][0]["stages"][stage.name]["outcome"] == "done"
    assert all("of_copy" in row for row in first["depthwise"].values())
    assert set(first["baseline"]) == {
        "conv_small_035/b2/bfloat16/channels_last",
        "conv_small_035/b2/bfloat16/max-autotune",
    }
    provenance, configs = tuned.read(tmp_path / "first" / "tuned.json")
    assert provenance["device"] == "a made-up device"
    assert configs
    earlier = [str(tmp_path / "first" / name) for name in ("campaign.json", "tuned.json")]
    second = _dry_run(tmp_path / "second", "--resume", *earlier)
    assert {name: rows for name, rows in second.items() if name != "calls"} == {
        name: rows for name, rows in first.items() if name != "calls"
    }
    assert len(second["calls"]) == 2
