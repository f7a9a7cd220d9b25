"""Whole patched models by the Triton kernels, in the interpreter, against eager: what a GPU runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpus import interpret
from models import HYBRID, SMALL, assert_patched_is_as_exact, create, images
from training_models import assert_trains_alike, smooth

import mnv4_kernels as mk

pytestmark = pytest.mark.usefixtures("_gpu")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # what eager resizes is filled with NaN by `_poisoned_memory` otherwise, which takes longer than the kernels
    torch.use_deterministic_algorithms(False)
    interpret(monkeypatch)


def test_a_patched_network_matches_eager() -> None:
    assert_patched_is_as_exact(create(SMALL), images(1, 3, 33, 40))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", HYBRID])
def test_whole_models_match_eager_in_every_precision(name: str, dtype: torch.dtype) -> None:
    assert_patched_is_as_exact(create(name).to(dtype), images(1, 3, 64, 64).to(dtype))


@pytest.mark.slow
def test_an_anti_aliased_model_matches_eager_around_the_pools_of_timm() -> None:
    assert_patched_is_as_exact(create("mobilenetv4_conv_aa_medium"), images(1, 3, 64, 64))


def test_explain_names_the_gates_choice_and_what_it_declined() -> None:
    model, x = create(SMALL), images(1, 3, 32, 32)
    mk.patch(model)
    with torch.no_grad():
        (row,) = [row for row in mk.explain(model, x).rows if row.name == "blocks.3.1"]
    assert row.kernel == "Triton"
    assert row.steps == ("dw_start + pw_exp + dw_mid + pw_proj: uib",)
    assert "predicted" in row.reason
    assert "not unfused" in row.reason or row.reason.startswith("unfused")


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_training_matches_eager(name: str) -> None:
    # the kernels are called as functions here, which no dispatcher sees
    assert_trains_alike(smooth(name), images(2, 3, 48, 48), used=False)
