"""Everything that a GPU is needed for, in one call: tests, ceilings, tuning, kernels, models.

    python benchmarks/gpu_campaign.py --output campaign.json --minutes 9
    python benchmarks/gpu_campaign.py --output campaign.json --sections kernels models

Each section writes its part of the file as it goes; a section that fails leaves its error there and the rest
runs on, and a second call goes on where the first was cut off. Winners go to `mnv4_kernels/tuned`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import MODELS, Block, UibShape, blocks, calls, uib_arguments

from mnv4_kernels import tuned
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import gate, tune
from mnv4_kernels.ops.gpu.traffic import Ceilings

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Campaign:
    """The output file, the clock, and what every section needs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path: Path = arguments.output
        self.arguments = arguments
        self.deadline = time.monotonic() + 60 * arguments.minutes
        self.data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data["provenance"] = provenance()
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def late(self) -> bool:
        """True once the time is up."""
        return time.monotonic() > self.deadline

    def save(self) -> None:
        """Writes the file whole, so that a cut never leaves half of one."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)

    def rows(self, section: str) -> dict[str, Any]:
        """{key: row} of a section, kept between calls."""
        found: dict[str, Any] = self.data.setdefault(section, {})
        return found

    def time(self, run: Callable[[], Any], repeats: int = 50) -> dict[str, float]:
        """Median and minimum microseconds with a cold L2."""
        run()
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        return {"median_us": round(statistics.median(times), 2), "min_us": round(min(times), 2)}


def provenance() -> dict[str, Any]:
    """Where and how this was measured."""
    import timm
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "benchmarks/gpu_campaign.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "not a git checkout",
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "timm": timm.__version__},
    }


def tests(campaign: Campaign) -> None:
    """The tests marked `gpu`."""
    seconds = max(30, int(campaign.deadline - time.monotonic()))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    campaign.data["tests"] = {"status": done.returncode, "tail": done.stdout[-4000:]}


def ceilings(campaign: Campaign) -> None:
    """A large copy, a copy within L2, and a large matrix product."""
    large = torch.empty(2**30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(large)
    us = campaign.time(lambda: other.copy_(large))["median_us"]
    found = {"copy_gb_s": round(2 * large.numel() / us / 1e3, 1)}
    within = large[: 8 * 2**20]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(200):
        other[: within.numel()].copy_(within)
    end.record()
    end.synchronize()
    found["l2_gb_s"] = round(200 * 2 * within.numel() / (begin.elapsed_time(end) * 1e6), 1)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    us = campaign.time(lambda: a @ b)["median_us"]
    found["matmul_tflop_s"] = round(2 * 8192**3 / us / 1e6, 1)
    campaign.data["ceilings"] = found


def _cases(campaign: Campaign) -> list[tuple[str, Block, int, str]]:
    arguments = campaign.arguments
    return [
        (model, block, batch, dtype)
        for dtype in arguments.dtypes
        for batch in arguments.batches
        for model in arguments.models
        for block in blocks(model, batch)
    ]


def sweep(campaign: Campaign) -> None:
    """Tunes every choice of the models' ops; resumes from the tuned file."""
    measured = campaign.data.get("ceilings")
    if not measured:
        raise RuntimeError("run the section `ceilings` first: a tuned file names them")
    path = tuned.shipped(torch.cuda.get_device_name())
    where, failures = campaign.data["provenance"], campaign.rows("sweep").setdefault("failures", [])
    for _, block, _, dtype in _cases(campaign):
        if campaign.late():
            break
        made = [(call.op, call.arguments) for call in calls(block, DTYPES[dtype], "cuda")]
        failures += tune.tune(
            made,
            path,
            command=where["command"],
            commit=where["commit"],
            ceilings=(measured["copy_gb_s"], measured["matmul_tflop_s"]),
            stop=campaign.late,
        )
        campaign.save()


def kernels(campaign: Campaign) -> None:
    """Every op call of the models: error against the reference, time, bytes per second, the reference's time."""
    rows = campaign.rows("kernels")
    for model, block, batch, dtype in _cases(campaign):
        for call in calls(block, DTYPES[dtype], "cuda"):
            key = f"{model}/b{batch}/{dtype}/{call.role}/{call.op}"
            if key in rows or campaign.late():
                continue
            result, launches, choices = tune.build((call.op, call.arguments), {})
            run = [launch.run for launch in launches]
            for launch in run:
                launch()
            expected = REFERENCES[call.op](*call.arguments)
            pairs = list(zip(result, expected, strict=True)) if isinstance(result, tuple) else [(result, expected)]
            scale = max(float(wanted.abs().max()) for _, wanted in pairs) + 1e-12
            error = max(float((found - wanted).abs().max()) for found, wanted in pairs) / scale
            tensors = [value for value in (*call.arguments, *(found for found, _ in pairs)) if torch.is_tensor(value)]
            timing = campaign.time(lambda run=run: [launch() for launch in run])
            least = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            rows[key] = {
                **timing,
                "relative_error": error,
                "least_bytes": least,
                "gb_s": round(least / timing["median_us"] / 1e3, 1),
                "configs": {name: str(config) for name, config in choices.items()},
                "eager": campaign.time(lambda call=call: REFERENCES[call.op](*call.arguments), 10),
            }
            campaign.save()


def plans(campaign: Campaign) -> None:
    """The gate against the clock: every plan of each distinct block, predicted and measured."""
    from mnv4_kernels.ops.uib.triton_uib import build

    rows = campaign.rows("plans")
    measured = Ceilings(**campaign.data.get("ceilings", {}))
    for model, block, _, dtype in _cases(campaign):
        if not isinstance(block.shape, UibShape):
            continue
        key = f"{dtype}/{json.dumps(asdict(block.shape))}"
        if key in rows or campaign.late():
            continue
        arguments = uib_arguments(block.shape, block.act, DTYPES[dtype], "cuda")
        found = {}
        for plan in gate.uib_plans(block.shape, DTYPES[dtype].itemsize, measured):
            run = [launch.run for launch in build(*arguments, plan=plan)[1]]
            timing = campaign.time(lambda run=run: [launch() for launch in run], 20)
            found[plan.name] = {**timing, "predicted_us": round(plan.us, 1), "launches": plan.launches}
        chosen = gate.uib(block.shape, DTYPES[dtype].itemsize, measured).plan.name
        rows[key] = {"first_seen": f"{model} {block.name}", "chosen": chosen, "plans": found}
        campaign.save()


def models(campaign: Campaign) -> None:
    """Whole models, graph replay: eager, channels_last, `torch.compile(max-autotune)`, ours."""
    import timm

    import mnv4_kernels as mk

    rows = campaign.rows("models")
    arguments = campaign.arguments
    for dtype in arguments.dtypes:
        for batch in arguments.batches:
            for name in arguments.models:
                key = f"{name}/b{batch}/{dtype}"
                if key in rows or campaign.late():
                    continue
                net = timm.create_model(f"mobilenetv4_{name}").eval().cuda().to(DTYPES[dtype])
                size = net.default_cfg["input_size"][-1]
                x = torch.randn(batch, 3, size, size, device="cuda", dtype=DTYPES[dtype])
                nhwc = x.contiguous(memory_format=torch.channels_last)
                row: dict[str, Any] = {}
                with torch.no_grad():
                    row["eager"] = campaign.time(lambda net=net, x=x: net(x), 10)
                    net = net.to(memory_format=torch.channels_last)
                    expected = net(nhwc)
                    row["channels_last"] = campaign.time(lambda net=net, x=nhwc: net(x), 10)
                    compiled = torch.compile(net, mode="max-autotune")
                    row["compiled"] = campaign.time(lambda run=compiled, x=nhwc: run(x))
                    mk.patch(net)
                    row["ours"] = campaign.time(_replay(net, nhwc))
                    scale = float(expected.abs().max()) + 1e-12
                    row["relative_error"] = float((net(nhwc) - expected).abs().max()) / scale
                rows[key] = row
                campaign.save()


def _replay(net: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Replay of the model's launches as one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x)
    return graph.replay


SECTIONS: dict[str, Callable[[Campaign], None]] = {
    "ceilings": ceilings,
    "tests": tests,
    "kernels": kernels,
    "plans": plans,
    "models": models,
    "sweep": sweep,
}


def main() -> int:
    """Runs the sections; 1 if one of them failed, 2 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--models", nargs="+", default=["conv_small", "conv_medium", "hybrid_medium"], choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("a CUDA device is needed; `gpu_offline.py` and `gpu_predictions.py` work without", file=sys.stderr)
        return 2
    campaign = Campaign(arguments)
    failed = 0
    for name in arguments.sections:
        if campaign.late():
            print(f"{name}: no time left; call again to go on")
            continue
        begin = time.monotonic()
        try:
            SECTIONS[name](campaign)
            campaign.data.get("errors", {}).pop(name, None)
        # one broken section must not cost the others
        except Exception:
            failed = 1
            campaign.data.setdefault("errors", {})[name] = traceback.format_exc()
            print(traceback.format_exc(), file=sys.stderr)
        campaign.save()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
