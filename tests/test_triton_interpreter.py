"""Runs every Triton kernel on CPU tensors, in Triton's interpreter.

The interpreter is chosen when Triton is first imported, so each file of `triton_interpreted` runs in a
process of its own; their names don't match pytest's pattern, so that nothing else collects them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
FILES = [*sorted((HERE / "triton_interpreted").glob("interpreted_*.py")), HERE / "test_triton_gpu.py"]

#: Of training, of whole models, of the campaign: most of the time.
SLOW = {"bn_act", "bn_act_conv", "bn_act_dwconv", "campaign", "models", "mqa_backward"}

Runs = dict[Path, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The selected files' processes, as many at a time as there are cores: an interpreted kernel uses one."""
    items: list[Any] = [item for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {item.callspec.params["file"]: pool.submit(_run, item.callspec.params["file"]) for item in items}


def _run(file: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "--tb=short", "-p", "no:cacheprovider", str(file)]
    # the tests for a device know that they are interpreted
    command += ["-m", "gpu"] if file.parent == HERE else []
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _parameter(file: Path) -> Any:
    name = file.stem.removeprefix("interpreted_")
    return pytest.param(file, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("file", [_parameter(file) for file in FILES])
def test_kernel_matches_its_reference_in_the_interpreter(file: Path, runs: Runs) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
