"""Predicted GPU times of the twelve models, from the traffic model: nothing here was measured.

    python benchmarks/gpu_predictions.py --write
    python benchmarks/gpu_predictions.py --train --write

Writes `results/gpu/gpu_predictions.json` and `.md` (or `gpu_predictions_training`), for the first run on a device to
confirm or correct.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import MODELS, AttentionShape, Block, Call, ConvShape, HeadShape, blocks, launches
from gpu_training import training_calls

from mnv4_kernels.ops.gpu import gate, heuristics, traffic
from mnv4_kernels.ops.gpu.gate import ConvPairShape, UibShape
from mnv4_kernels.ops.gpu.traffic import Ceilings, Cost

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
BATCHES = (1, 8, 64, 256)


def _conv(shape: ConvShape, size: int) -> list[Cost]:
    out = -(-shape.height // shape.stride) * -(-shape.width // shape.stride)
    m, taps = shape.batch * out, shape.kernel**2
    k, taps = (shape.channels * taps, 1) if shape.image else (shape.channels, taps)
    config = heuristics.gemm(m, shape.outputs, k, size, taps=taps)
    if shape.kernel == 1:
        return [traffic.gemm(m, shape.outputs, k, size, config, shape.residual)]
    out = (-(-shape.height // shape.stride), -(-shape.width // shape.stride))
    sizes = ((shape.height, shape.width), out)
    cost = traffic.conv(shape.batch, shape.channels, shape.outputs, *sizes, shape.kernel**2, size, config)
    if not shape.image:
        return [cost]
    # one reduction over all taps of all channels
    padded = traffic.gemm(m, shape.outputs, k, size, config)
    return [replace(padded, memory=cost.memory)]


def _attention(shape: AttentionShape, size: int, fused: bool) -> list[Cost]:
    batch, channels, depth = shape.batch, shape.channels, max(shape.key_depth, shape.value_depth)
    keys = -(-shape.height // shape.stride) * -(-shape.width // shape.stride)
    taps = 9 if shape.stride > 1 else 1
    config = heuristics.kv(batch * keys, depth, size)
    first = traffic.kv(batch, channels, (shape.height, shape.width), keys, depth, taps, size, config)
    rest = gate.AttentionShape(
        batch,
        channels,
        channels,
        shape.height * shape.width,
        keys,
        shape.heads,
        shape.key_depth,
        shape.value_depth,
        residual=True,
    )
    plan = gate.attention(rest, size).plan if fused else gate.attention_plans(rest, size)[0]
    return [first, *(step.cost for step in plan.steps)]


def _head(shape: HeadShape, size: int) -> list[Cost]:
    read = float(size * shape.batch * shape.channels * shape.height * shape.width)
    pool = Cost(read, read, read, 0.0, read / size, shape.batch * -(-shape.channels // 64))
    products = ((shape.features, shape.channels), (shape.classes, shape.features))
    configs = [heuristics.gemm(shape.batch, n, k, size) for n, k in products]
    return [pool, *(traffic.gemm(shape.batch, n, k, size, c) for (n, k), c in zip(products, configs, strict=True))]


def costs(block: Block, size: int, fused: bool) -> list[Cost]:
    """The launches of a block: those of the gate's plan, or of the unfused one."""
    shape = block.shape
    if isinstance(shape, UibShape):
        plan = gate.uib(shape, size).plan if fused else gate.uib_plans(shape, size)[0]
        return [step.cost for step in plan.steps] * plan.repeats
    if isinstance(shape, ConvPairShape):
        plan = gate.conv_pair(shape, size).plan if fused and not block.across else gate.conv_pair_plans(shape, size)[0]
        return [step.cost for step in plan.steps]
    if isinstance(shape, ConvShape):
        return _conv(shape, size)
    return _attention(shape, size, fused) if isinstance(shape, AttentionShape) else _head(shape, size)


def block_bytes(block: Block, size: int) -> float:
    """A block's input and output, each once: what no plan of single blocks goes below."""
    shape = block.shape
    x = shape.batch * shape.channels * shape.height * shape.width
    if isinstance(shape, HeadShape):
        return float(size * (x + shape.batch * shape.classes))
    if isinstance(shape, AttentionShape):
        return 2.0 * size * x
    if isinstance(shape, ConvShape):
        out = -(-shape.height // shape.stride) * -(-shape.width // shape.stride)
    else:
        out = shape.out[0] * shape.out[1]
    return float(size * (x + shape.batch * shape.outputs * out))


def row(model: str, batch: int, size: int = 2) -> dict[str, Any]:
    """One model and batch: predicted microseconds and bytes with the gate's plans and without any fusion."""
    ceilings = Ceilings().for_element_size(size)
    found: dict[str, Any] = {"model": model, "batch": batch, "dtype": "bfloat16" if size == 2 else "tf32"}
    for name, fused in (("plan", True), ("unfused", False)):
        each = [cost for block in blocks(model, batch) for cost in costs(block, size, fused)]
        found[f"{name}_us"] = round(sum(cost.us(ceilings) for cost in each), 1)
        found[f"{name}_mib"] = round(sum(cost.memory for cost in each) / 2**20, 1)
        found[f"{name}_launches"] = len(each)
    found["speed_up"] = round(found["unfused_us"] / found["plan_us"], 2)
    floor = sum(block_bytes(block, size) for block in blocks(model, batch)) / (ceilings.copy_gb_s * 1e3)
    found["block_floor_us"] = round(floor, 2)
    found["of_block_floor"] = round(found["plan_us"] / floor, 2)
    shapes = [block.shape for block in blocks(model, batch) if isinstance(block.shape, UibShape)]
    decisions = [gate.uib(shape, size) for shape in shapes]
    found["uib_blocks"] = len(decisions)
    found["fused_blocks"] = sum(decision.plan.name != "unfused" for decision in decisions)
    if batch in TARGETS:
        found["targets"] = TARGETS[batch](model)
    return found


def _at_256(model: str) -> dict[str, float]:
    times = {"conv_small": 2.0, "conv_medium": 2.0, "hybrid_medium": 2.0, "conv_large": 1.6, "hybrid_large": 1.6}
    found = {"of_block_floor at most": 2.5}
    return {**found, "times torch.compile": times[model]} if model in times else found


#: batch -> model -> what is to be reached on one H100 in bfloat16, against `torch.compile(mode="max-autotune")` in
#: channels_last, at batch 1 with its own CUDA graphs
TARGETS: dict[int, Callable[[str], dict[str, float]]] = {
    1: lambda model: {"times torch.compile": 1.5},
    256: _at_256,
}


def _products(call: Call) -> float:
    """Operations of a training call's matrix products; depthwise convolutions have none."""
    if call.op.startswith("mqa"):
        query, key = call.arguments[-5:-3]
        # forward two; backward scores and weights' gradient three times, and three gradients
        return 2.0 * query.numel() * key.shape[1] * (9 if call.op.endswith("_backward") else 2)
    if not call.op.startswith(("bn_act_conv", "bn_act_pwconv")):
        return 0.0
    backward = call.op.endswith("_backward")
    z, x, weight = (call.arguments[i] for i in ((0, 5, 12) if backward else (0, 0, 7)))
    pixels = (z if backward else x).numel() / (z if backward else x).shape[1]
    if not backward and call.op == "bn_act_conv":
        stride = call.arguments[8]
        pixels /= stride[0] * stride[1]
    need_input = not backward or call.arguments[-2]
    return 2.0 * pixels * weight.numel() * (1 + need_input if backward else 1)


def training_row(model: str, batch: int) -> dict[str, Any]:
    """One model and batch: predicted microseconds, bytes and launches of a step's forward and backward in bfloat16."""
    ceilings = Ceilings()
    us = 0.0
    moved = count = 0
    for block in blocks(model, batch):
        for call in training_calls(block, torch.bfloat16, "meta"):
            operations = _products(call)
            steps = launches(call)
            # launches of one kernel (the phases of a stride) share what they read
            tensors = {
                (step.kernel.__name__, id(value)): value.numel() * value.element_size()
                for step in steps
                for value in step.arguments
                if isinstance(value, torch.Tensor)
            }
            of_call = sum(tensors.values())
            moved += of_call
            count += len(steps)
            floor = max(of_call / (ceilings.copy_gb_s * 1e3), operations / (ceilings.matmul_tflop_s * 1e6))
            us += floor + len(steps) * ceilings.launch_us
    return {
        "model": model, "batch": batch, "dtype": "bfloat16", "us": round(us, 1), "mib": round(moved / 2**20, 1),
        "launches": count,
    }  # fmt: skip


def training_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of training steps, headed by what it is."""
    lines = [
        "# Predicted training steps, not measured",
        "",
        "Forward and backward of the training kernels in bfloat16, from what each launch reads and writes and what its",
        "products compute, each at the ceilings of one H100 as in `gpu_predictions.md`, plus 1.5 us a launch. Pool,",
        "classifier, loss, optimizer and autocast's casts are left out. No kernel of this table has run on a GPU.",
        "`python benchmarks/gpu_predictions.py --train --write` makes this file.",
        "",
        "| model | batch | us | MiB | launches |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r['model']} | {r['batch']} | {r['us']} | {r['mib']} | {r['launches']} |" for r in rows]
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, headed by what it is."""
    lines = [
        "# Predicted, not measured",
        "",
        "From the traffic model (`mnv4_kernels/ops/gpu/traffic.py`) with the ceilings of one H100: copy 3.0 TB/s and",
        "matrix product 790 TFLOP/s as measured by the project, the others assumed. No kernel of this table has run on",
        "a GPU: the first run of `benchmarks/gpu_campaign.py` on one confirms or corrects it. `plan` is what the gate",
        "chooses, `unfused` the same kernels with no fusion, at their floors: no prediction of any compiler's time,",
        "larger by what its kernels miss theirs; a launch inside a CUDA graph is taken to cost 1.5 us. `floor`",
        "has each block's input and output once. The pools of the anti-aliased models are left out and their",
        "projections counted before them, so those rows are rough. The targets are the project's, against",
        "torch.compile in max-autotune and channels_last, at batch 1 with its CUDA graphs, and beside the floor.",
        "`python benchmarks/gpu_predictions.py --write` makes this file.",
        "",
        "| model | batch | plan us | unfused us | ratio | target ratio | floor us | plan / floor | target | plan MiB "
        "| unfused MiB | launches | fused blocks |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        targets = r.get("targets", {})
        lines.append(
            f"| {r['model']} | {r['batch']} | {r['plan_us']} | {r['unfused_us']} | {r['speed_up']} "
            f"| {targets.get('times torch.compile', '')} | {r['block_floor_us']} | {r['of_block_floor']} "
            f"| {targets.get('of_block_floor at most', '')} | {r['plan_mib']} | {r['unfused_mib']} "
            f"| {r['plan_launches']} | {r['fused_blocks']} of {r['uib_blocks']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints the table; writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--train", action="store_true", help="training steps")
    parser.add_argument("--write", action="store_true", help="write the files")
    arguments = parser.parse_args()
    train = arguments.train
    name = "gpu_predictions_training" if train else "gpu_predictions"
    batches, predict = ((64, 256), training_row) if train else (BATCHES, row)
    rows = [predict(model, batch) for model in arguments.models for batch in batches]
    text = training_markdown(rows) if train else markdown(rows)
    print(text)
    if arguments.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        data = {"measured": False, "ceilings": asdict(Ceilings()), "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
