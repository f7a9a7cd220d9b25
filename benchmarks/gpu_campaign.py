"""Everything that a GPU is needed for, in a few calls of less than ten minutes, the most valuable first.

The package must be importable: installed, or in a checkout by `PYTHONPATH=.` (its C++ library is not needed).

    python benchmarks/gpu_campaign.py                                # all stages, as far as nine minutes go
    python benchmarks/gpu_campaign.py --resume campaign.json         # goes on where an earlier file stops
    python benchmarks/gpu_campaign.py --stages ours baseline --models conv_small
    python benchmarks/gpu_campaign.py --rows 2                        # a look at every stage, two rows each
    python benchmarks/gpu_campaign.py --dry-run                      # the control flow, without a device

Results go to `campaign.json` in $OUT, or in --out, row by row. A stage runs in a process of its own: a kernel that
raises leaves its error in its row; one that kills the process or hangs is noted as such, and the stage goes on
behind it in a new process. Tuned configs go to `tuned.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_shapes import MODELS

import mnv4_kernels

ROOT = Path(__file__).resolve().parent.parent

#: runs one stage
WORKER = ROOT / "benchmarks" / "gpu_worker.py"

#: what a worker exits with when the device no longer answers it, when the clock stopped it between two rows, and when
#: it is done and rows have errors; Python's own 1 is a stage that broke
POISONED, LATE, FAILED = 3, 4, 5

#: seconds past its time that a row may go on
GRACE = 10.0

#: why a worker was ended that a longer call would have let go on
CUT = "the call's time was up"
#: minutes of a call
CALL = 9.0


@dataclass(frozen=True)
class Stage:
    """One part of the campaign."""

    name: str
    #: share of a call that it may take, in minutes, and more of a longer one; what it leaves over is the next one's
    minutes: float
    #: a row that takes longer than this is given up, in seconds
    row_limit: float = 60.0


#: In the order of their value.
STAGES = (
    Stage("ceilings", 0.5),
    # in all processors at once; without it every first launch compiles alone
    Stage("precompile", 2.5, 150.0),
    Stage("correctness", 2.5),
    Stage("depthwise", 1.5),
    Stage("ours", 2.5, 120.0),
    Stage("baseline", 9.0, 420.0),
    Stage("kernels", 2.0),
    Stage("plans", 2.0),
    Stage("precompile_training", 2.5, 150.0),
    Stage("training_kernels", 1.5),
    # a row may hold a compilation by inductor, forward and backward
    Stage("steps", 6.0, 300.0),
    # one row compiles every candidate of every kernel
    Stage("tests", 9.0, 500.0),
    Stage("sanitizer", 2.5, 150.0),
    Stage("sweep", 6.0, 120.0),
)


class Results:
    """The campaign's file: {section: {key: row}}, always whole on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(self) -> None:
        """Writes the file whole, so that a cut never leaves half of one."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)

    def rows(self, section: str) -> dict[str, Any]:
        """{key: row} of a section."""
        found: dict[str, Any] = self.data.setdefault(section, {})
        return found

    def begin(self, section: str, key: str) -> None:
        """Notes what runs now, for whoever finds the process dead."""
        self.data["running"] = [section, key]
        self.save()

    def end(self, section: str, key: str, row: dict[str, Any]) -> None:
        """Notes what came out."""
        self.data.pop("running", None)
        self.rows(section)[key] = row
        self.save()

    def bury(self, reason: str | None) -> bool:
        """Gives the row that was running this reason as its error, None: leaves it to a later call; False: none was."""
        running = self.data.pop("running", None)
        if running is not None and reason is not None:
            self.rows(running[0])[running[1]] = {"error": reason}
        self.save()
        return running is not None

    def errors(self) -> list[tuple[str, str]]:
        """(section/key, error) of each row that failed."""
        sections = [(name, rows) for name, rows in self.data.items() if isinstance(rows, dict)]
        return [
            (f"{name}/{key}", row["error"])
            for name, rows in sections
            for key, row in rows.items()
            if isinstance(row, dict) and "error" in row
        ]


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and how this was measured; the worker adds the device."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "benchmarks/gpu_campaign.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "not a git checkout",
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "python": platform.python_version(),
        "dry_run": arguments.dry_run,
    }


def supervise(stage: Stage, arguments: argparse.Namespace, deadline: float) -> str:
    """Runs a stage in processes of its own until it is done or its time is up; returns how it ended."""
    path = arguments.out / "campaign.json"
    command = [sys.executable, str(WORKER), *worker_arguments(stage, arguments)]
    while time.monotonic() < deadline:
        # a session of its own: what it starts ends with it
        worker = subprocess.Popen(
            # by a clock that both share: importing takes the worker seconds
            [*command, "--until", str(deadline)],
            cwd=ROOT,
            env=environment(arguments),
            start_new_session=True,
        )
        reason = watch(worker, path, arguments.row_limit or stage.row_limit, deadline)
        if not reason:
            return "out of time" if worker.returncode == LATE else "done"
        if reason == CUT:
            Results(path).bury(None)
            return "out of time"
        # the row is noted and not tried again; without one the stage itself can't run
        if worker.returncode != POISONED and not Results(path).bury(reason):
            return reason
    return "out of time"


def watch(worker: subprocess.Popen[bytes], path: Path, row_limit: float, deadline: float) -> str:
    """Waits for a worker; returns why it had to be replaced, empty where it ended by itself."""
    idle, seen, last = 0.0, _stamp(path), time.monotonic()
    while worker.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        # a machine that stood still meanwhile stood still for the worker too
        idle, last = idle + min(now - last, 0.5), now
        if _stamp(path) != seen:
            idle, seen = 0.0, _stamp(path)
        # a worker looks at the clock between rows: this is for one that can't
        if now > deadline + GRACE or idle > row_limit:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            return CUT if idle < row_limit / 2 else f"no answer for {idle:.0f} s; the process was ended"
    if worker.returncode in (0, FAILED, LATE):
        return ""
    return "the device no longer answered" if worker.returncode == POISONED else f"died with {worker.returncode}"


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def worker_arguments(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    """What the worker of a stage is called with."""
    found = ["--stage", stage.name, "--out", str(arguments.out), "--models", *arguments.models]
    found += ["--batches", *map(str, arguments.batches), "--dtypes", *arguments.dtypes]
    if arguments.size:
        found += ["--size", str(arguments.size)]
    if arguments.rows:
        found += ["--rows", str(arguments.rows)]
    return [*found, "--dry-run"] if arguments.dry_run else found


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The worker's environment: the package that this process found, and the configs that were tuned so far."""
    paths = [
        str(Path(mnv4_kernels.__file__).resolve().parents[1]),
        str(ROOT / "benchmarks"),
        os.environ.get("PYTHONPATH", ""),
    ]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if (arguments.out / "tuned.json").exists():
        found["MNV4_KERNELS_TUNED"] = str(arguments.out / "tuned.json")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    default = Path(os.environ.get("OUT", "gpu_campaign"))
    parser.add_argument("--out", type=Path, default=default, help="folder of the results; $OUT where it is set")
    parser.add_argument("--resume", type=Path, nargs="*", default=[], help="files of an earlier call to go on from")
    parser.add_argument("--retry", action="store_true", help="try rows again that failed in an earlier call")
    parser.add_argument("--stages", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS,
        default=["conv_small", "conv_medium", "hybrid_medium", "conv_large", "hybrid_large"],
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--size", type=int, help="of the images; timm's own for each model by default")
    parser.add_argument("--minutes", type=float, default=CALL, help="for this call")
    parser.add_argument("--row-limit", type=float, help="seconds after which a row is given up")
    parser.add_argument("--rows", type=int, help="new rows of each stage, at most")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, by the references, with a made-up clock")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the stages; 1 if a row or a stage failed, 2 without a device."""
    arguments = parse()
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("a CUDA device is needed, or --dry-run", file=sys.stderr)
            return 2
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for earlier in arguments.resume:
        shutil.copyfile(earlier, arguments.out / ("tuned.json" if "tuned" in earlier.name else "campaign.json"))
    results = Results(arguments.out / "campaign.json")
    results.bury("an earlier call ended here")
    if arguments.retry:
        for name, _ in results.errors():
            section, _, key = name.partition("/")
            del results.data[section][key]
    results.data.setdefault("calls", []).append(provenance(arguments))
    results.save()
    end, spare = time.monotonic() + 60 * arguments.minutes, 0.0
    failed = False
    for stage in (stage for stage in STAGES if stage.name in arguments.stages):
        begin = time.monotonic()
        deadline = min(end, begin + 60 * stage.minutes * max(1.0, arguments.minutes / CALL) + spare)
        outcome = supervise(stage, arguments, deadline)
        took = time.monotonic() - begin
        spare = max(0.0, deadline - time.monotonic())
        failed |= outcome not in ("done", "out of time")
        results = Results(results.path)
        results.data["calls"][-1].setdefault("stages", {})[stage.name] = {"outcome": outcome, "seconds": round(took, 1)}
        results.save()
        print(f"{stage.name}: {outcome} after {took:.0f} s", flush=True)
    for name, error in results.errors():
        print(f"{name}: {error.strip().splitlines()[-1]}", file=sys.stderr)
    return int(failed or bool(results.errors()))


if __name__ == "__main__":
    sys.exit(main())
