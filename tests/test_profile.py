"""Where the optimized network's time goes: every operation is some step's, and the page can be read alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mnv4_kernels.backends import native
from mnv4_kernels.benchmark.case import Case
from mnv4_kernels.benchmark.flops import count_flops
from mnv4_kernels.benchmark.profile_page import render, roofline, stack
from mnv4_kernels.benchmark.profiling import Profile, profile
from mnv4_kernels.benchmark.rival import _by_block
from mnv4_kernels.benchmark.rounds import Protocol
from mnv4_kernels.cli import main

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons()))


def profiled(model: str, size: int, batch: int = 1, dtype: str = "float32", threads: int = 1) -> Profile:
    return profile(Case(f"mobilenetv4_{model}", batch, size, dtype, threads), repeats=3)


@pytest.mark.parametrize(
    ("model", "batch", "dtype", "threads"),
    [
        ("conv_small_035", 1, "float32", 1),
        ("conv_small_035", 3, "bfloat16", 2),
        ("hybrid_medium_075", 1, "float32", 2),
        ("hybrid_large_075", 2, "bfloat16", 1),
    ],
)
def test_the_blocks_make_all_operations_of_the_model(model: str, batch: int, dtype: str, threads: int) -> None:
    found = profiled(model, 96, batch, dtype, threads)
    with torch.device("meta"):
        network = timm.create_model(f"mobilenetv4_{model}")
    assert sum(block.flops for block in found.blocks) == count_flops(network, (batch, 3, 96, 96))
    blocks = {f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))}
    # the second of two convolutions in a row may ride on the first, and then has no time of its own
    assert {block.name for block in found.blocks} - {"input", "output"} <= {"stem", "head", *blocks}
    assert len(found.blocks) >= len(blocks)


def test_the_weights_of_the_blocks_are_those_of_the_model() -> None:
    found = profiled("conv_small_035", 64)
    with torch.device("meta"):
        network = timm.create_model("mobilenetv4_conv_small_035")
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    # folded: a bias an output channel beside them
    biases = sum(m.weight.shape[0] for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    assert sum(block.weight_bytes for block in found.blocks) == 4 * (weights + biases)
    assert all(block.bytes > block.weight_bytes for block in found.blocks)


def test_the_times_of_steps_and_blocks_are_the_same() -> None:
    found = profiled("hybrid_medium_075", 64)
    assert sum(step.us for step in found.steps) == pytest.approx(sum(block.us for block in found.blocks))
    assert {step.kernel for step in found.steps} >= {"pointwise", "attention"}


def test_a_step_of_two_kernels_says_why() -> None:
    fused = [step for step in profiled("conv_small_035", 64).steps if "+" in step.kernel]
    assert fused
    assert all(step.reason for step in fused)


def test_the_planner_says_why_a_depthwise_is_a_step_of_its_own() -> None:
    alone = [step for step in profiled("conv_small_035", 64, threads=2).steps if step.kernel == "depthwise"]
    assert any("panels can't be shared evenly by 2 workers" in step.reason for step in alone)


def test_the_planner_says_that_a_batch_takes_turns() -> None:
    steps = profiled("conv_small_035", 224, batch=8).steps
    assert any("images at a time stay within L2" in step.reason for step in steps)


def test_a_competitors_times_go_to_the_block_that_a_node_belongs_to() -> None:
    modules = {"relu": "bn1.act", "relu_1": "blocks.0.0.bn1.act", "node_add": "blocks.1.0", "linear": "classifier"}
    steps = [("relu_nchwc", 1.0), ("relu_1_nchwc", 2.0), ("ReorderOutput_token_7", 4.0), ("node_add/x", 8.0)]
    steps.append(("linear", 16.0))
    assert _by_block(steps, modules) == {"stem": 1.0, "blocks.0.0": 6.0, "blocks.1.0": 8.0, "head": 16.0}


def test_a_block_that_rides_on_ours_before_it_is_compared_with_both() -> None:
    found = profiled("conv_small_035", 64)
    found.rival = {"stem": 1.0, "blocks.0.0": 2.0, "blocks.1.0": 4.0, "head": 8.0}
    head, rows = found.block_table()
    theirs = {cells[0]: cells[head.index("onnxruntime us")] for cells in rows}
    assert "blocks.0.0" not in theirs
    assert (theirs["stem"], theirs["blocks.1.0"], theirs["(all)"]) == ("3.0", "4.0", "15.0")
    assert stack(found, 1e4).count("<rect") == len(found.blocks) + 4


@pytest.mark.slow
def test_onnx_runtimes_blocks_are_those_of_the_model() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    found = profile(Case("mobilenetv4_hybrid_medium_075", 1, 64), repeats=2, protocol=Protocol())
    assert not found.rival_missing
    with torch.device("meta"):
        stages = timm.create_model("mobilenetv4_hybrid_medium_075").blocks
    blocks = {f"blocks.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))}
    assert set(found.rival) == {"stem", "head", *blocks}


def test_the_page_needs_no_other_file_and_has_a_point_and_a_piece_a_block() -> None:
    found = profiled("conv_small_035", 64)
    page = render([found])
    assert "src=" not in page
    assert "href=" not in page
    assert roofline(found).count("<circle") == sum(block.flops > 0 for block in found.blocks)
    assert stack(found, 1e4).count("<rect") == len(found.blocks)
    inside = [float(x) for x in re.findall(r"cx='([-\d.]+)'", roofline(found))]
    assert all(60 <= x <= 700 for x in inside)


def test_bench_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, written, tables = tmp_path / "profile.html", tmp_path / "profile.json", tmp_path / "profile.md"
    options = ["--size", "64", "--threads", "1", "--html", str(page), "--json", str(written)]
    options += ["--markdown", str(tables)]
    assert main(["bench", "--profile", "conv_small_035", *options]) == 0
    printed = capsys.readouterr().out
    assert "blocks.1.0" in printed
    assert "(all)" in printed
    assert "<circle" in page.read_text()
    assert "weight_bytes" in written.read_text()
    assert "| blocks.1.0 |" in tables.read_text()
