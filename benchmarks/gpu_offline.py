"""Compiles every launch of the twelve models for GPUs that are not there: registers, spills, shared memory.

    python benchmarks/gpu_offline.py --models conv_small hybrid_medium --dtypes bfloat16 --batches 1 256
    python benchmarks/gpu_offline.py --train      # the training kernels instead

Writes `results/gpu/gpu_offline.json` and `.md`, or `gpu_offline_training`; exits with 1 if a config spills or takes too
much shared memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import MODELS, blocks, calls, compiles_as, launches
from gpu_training import training_calls

from mnv4_kernels.ops.gpu.config import to_json
from mnv4_kernels.ops.gpu.launch import Launch
from mnv4_kernels.ops.gpu.offline import CONSUMER_SHARED_LIMIT, SHARED_LIMIT, resources
from mnv4_kernels.ops.gpu.select import assume

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"

#: compute capability -> shared memory of a program; 86 stands for the consumer devices of the sm_80 family
TARGETS = {80: 163 * 1024, 86: CONSUMER_SHARED_LIMIT, 90: SHARED_LIMIT, 100: SHARED_LIMIT}


def shipped(
    models: list[str], batches: list[int], dtypes: list[torch.dtype], capability: int, train: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(role, launch) of every binary that a device of this capability runs, each once."""
    seen = set()
    calls_of = training_calls if train else calls
    with assume(capability):
        for model in models:
            for batch in batches:
                for block in blocks(model, batch):
                    for dtype in dtypes:
                        for call in calls_of(block, dtype, "meta"):
                            for launch in launches(call):
                                key = compiles_as(launch)
                                if key not in seen:
                                    seen.add(key)
                                    yield f"{model} b{batch} {call.role}", launch


def row(role: str, launch: Launch, capability: int) -> dict[str, Any]:
    """The resources of one launch, and why it must not ship."""
    used = resources(launch, capability)
    return {
        "kernel": launch.kernel.__name__.strip("_"),
        "role": role,
        "dtype": str(launch.arguments[0].dtype).removeprefix("torch."),
        "config": to_json(launch.config),
        "capability": capability,
        **asdict(used),
        "problems": used.problems(TARGETS[capability]),
    }


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """How it was made, the worst row of each kernel, dtype and capability, and every problem."""
    lines = [
        "# Offline table of the Triton kernels",
        "",
        "Made without a GPU: ptxas' figures of every binary that the heuristic configs of these models need;",
        "the most registers, spilled bytes and shared memory of each kernel.",
        "",
        f"`{command}`",
        "",
        "| kernel | dtype | sm | binaries | registers | spilled bytes | shared memory KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for entry in rows:
        groups.setdefault((entry["kernel"], entry["dtype"], entry["capability"]), []).append(entry)
    for (kernel, dtype, capability), entries in sorted(groups.items()):
        most = [max(entry[name] for entry in entries) for name in ("registers", "spilled", "shared")]
        lines.append(
            f"| {kernel} | {dtype} | {capability} | {len(entries)} | {most[0]} | {most[1]} | {most[2] / 1024:.1f} |"
        )
    problems = [entry for entry in rows if entry["problems"]]
    lines += ["", f"{len(rows)} binaries, {len(problems)} with problems."]
    lines += [f"- sm_{e['capability']} {e['kernel']} {e['role']}: {'; '.join(e['problems'])}" for e in problems]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compiles, prints progress, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--train", action="store_true", help="the training kernels instead")
    parser.add_argument("--write", action="store_true", help="write results/gpu/gpu_offline.{json,md}")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    rows, begin = [], time.monotonic()
    for capability in arguments.capabilities:
        for role, launch in shipped(arguments.models, arguments.batches, dtypes, capability, arguments.train):
            rows.append(row(role, launch, capability))
            if rows[-1]["problems"]:
                print(f"sm_{capability} {role} {launch.config}: {rows[-1]['problems']}", flush=True)
        print(f"sm_{capability}: {len(rows)} binaries so far, {time.monotonic() - begin:.0f} s", flush=True)
    if arguments.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = "gpu_offline_training" if arguments.train else "gpu_offline"
        (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        command = " ".join(["python", "benchmarks/gpu_offline.py", *sys.argv[1:]])
        (RESULTS / f"{name}.md").write_text(markdown(rows, command))
    return int(any(entry["problems"] for entry in rows))


if __name__ == "__main__":
    sys.exit(main())
