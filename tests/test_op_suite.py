"""The suite of single ops: its cases are timm's calls, a wrong result gets no time, and each op has its table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import competitors  # noqa: E402
from op_cases import heaviest_cases, multiplications, op_cases  # noqa: E402
from shapes import FOLDER, kept_calls  # noqa: E402

import mnv4_kernels  # noqa: E402
from mnv4_kernels.backends import native  # noqa: E402
from mnv4_kernels.testing import CASES, Case  # noqa: E402
from mnv4_kernels.testing.cases import conv, dwconv, head, kv_downsample, mqa, pwconv  # noqa: E402

OPS = ("dwconv_bn_act", "pwconv_bn_act", "conv_bn_act", "kv_downsample", "mqa", "head")

SMALL = (
    dwconv(20, (9, 6), kernel=(5, 5), stride=2, padding=(2, 2, 2, 2), act="relu"),
    pwconv(20, 24, (5, 3), batch=2, act="gelu"),
    conv(3, 24, (9, 6), stride=2, padding=(1, 1, 1, 1), act="relu"),
    kv_downsample(20, 16, 16, (8, 8), padding=(1, 1, 1, 1)),
    mqa(4, 16, 24, 9, (6, 5), batch=2),
    head(20, 24, 10, (3, 3), batch=2),
)


def run_suite(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "benchmarks"), *options]
    # the package that is tested, installed or not
    paths = [str(Path(mnv4_kernels.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # a worker of pytest-xdist is nowhere to time anything, to pytest-benchmark; its child is not one
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize("model", sorted(path.stem for path in FOLDER.glob("*.csv")))
def test_each_call_of_a_model_is_a_case(model: str) -> None:
    calls = kept_calls(model)
    downsampled = sum(call.op == "kv_downsample" for call in calls)
    # what follows `kv_downsample` is its projection; the last call is the head's
    assert len(op_cases([model], batch=1)) == len(calls) - downsampled
    assert sum(case.op == "head" for case in op_cases([model], batch=1)) == 1


def test_calls_that_models_share_are_timed_once() -> None:
    models = ["conv_small", "conv_small_050", "conv_small"]
    cases = op_cases(models, batch=1)
    assert len(set(map(str, cases))) == len(cases)
    assert set(map(str, cases)) == {str(case) for model in models for case in op_cases([model], batch=1)}


def test_the_default_is_the_heaviest_call_of_each_op() -> None:
    cases = heaviest_cases("hybrid_medium", batch=1)
    assert {case.op for case in cases} == set(OPS)
    (depthwise,) = (case for case in cases if case.op == "dwconv_bn_act")
    most = max((call for call in kept_calls("hybrid_medium") if call.op == "dwconv_bn_act"), key=multiplications)
    x, weight, *_ = depthwise.arguments()
    assert (x.shape[1], tuple(x.shape[2:]), tuple(weight.shape[2:])) == (most.channels, most.size, most.kernel)


@pytest.mark.parametrize("dtype", competitors.GATES, ids=str)
@pytest.mark.parametrize(
    ("case", "competitor"), [(case, name) for case in SMALL for name in competitors.competitors_of(case.op)], ids=str
)
def test_every_competitor_computes_the_op(case: Case, competitor: str, dtype: torch.dtype) -> None:
    if competitor == "compile":
        pytest.skip("test_the_suite_times_compiled_code does this one in a process of its own")
    if competitor == competitors.OURS and not native.available():
        pytest.skip("; ".join(native.reasons()))
    if reason := competitors.missing(competitor, dtype):
        pytest.skip(reason)
    with torch.no_grad():
        _, error = competitors.prepare(case, dtype, competitor)
    assert 0 < error < competitors.GATES[dtype]


@pytest.mark.parametrize("damage", [1e-3, float("nan")])
def test_a_wrong_result_gets_no_time(damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = competitors.Eager.convolution

    def damaged(*arguments: object, **options: object) -> competitors.Layer:
        layer = convolution(*arguments, **options)  # type: ignore[arg-type]
        return lambda x: layer(x) + damage

    monkeypatch.setattr(competitors.Eager, "convolution", damaged)
    with pytest.raises(competitors.WrongError, match="relative error"):
        competitors.prepare(SMALL[1], torch.float32, "eager")


def test_a_result_of_another_shape_gets_no_time() -> None:
    case = next(case for case in CASES if case.op == "pwconv_bn_act")
    arguments = case.arguments()
    with pytest.raises(competitors.WrongError, match="got shape"):
        competitors.check(case, arguments, lambda: arguments[0][..., :1])


@pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons()))
@pytest.mark.parametrize("memory", ["warm", "cold"])
def test_the_suite_prints_a_table_an_op(memory: str, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--memory", memory, "--benchmark-max-time", "0.01", "-k", "mqa or kv_downsample"]
    options += ["--markdown", str(tmp_path / "ops.md")]
    done = run_suite(*options, "--competitor", "eager", "--competitor", "ours", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for op in ("mqa", "kv_downsample"):
        assert f"\n{op}: microseconds (median), batch 1, 1 threads, {memory} caches\n" in done.stdout
    assert "best other / ours" in done.stdout
    kept = (tmp_path / "ops.md").read_text()
    assert kept.count("| best other / ours |") == 2
    assert "## How this was measured" in kept


@pytest.mark.slow
def test_the_suite_times_compiled_code(tmp_path: Path) -> None:
    done = run_suite("--competitor", "compile", "--benchmark-disable", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "12 passed" in done.stdout
