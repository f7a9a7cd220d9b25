"""What a measurement found: rows, JSON with provenance, and a page with a plot."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..backends import device
from .case import Case

DISTRIBUTIONS = ("mnv4_kernels", "torch", "triton", "timm", "onnxruntime", "openvino")


@dataclass
class Row:
    """One runtime in one case."""

    name: str
    ours: bool = False
    #: milliseconds of every timed call, a list a round
    rounds: list[list[float]] = field(default_factory=list)
    #: largest difference from eager float64 over the largest magnitude
    error: float | None = None
    #: why there is no time
    missing: str | None = None

    @property
    def median(self) -> float | None:
        """Milliseconds: the median over rounds of a round's median."""
        return statistics.median(map(statistics.median, self.rounds)) if self.rounds else None

    @property
    def minimum(self) -> float | None:
        """Milliseconds of the fastest call."""
        return min(map(min, self.rounds)) if self.rounds else None


@dataclass
class CaseResult:
    """All runtimes of one case, with the roofline measured beside them."""

    case: Case
    flops: int
    bytes: int
    gflops: float
    gbytes: float
    source: str
    rows: list[Row]

    @property
    def floor(self) -> float:
        """Milliseconds that no implementation can go below: the larger of arithmetic and least traffic."""
        return max(self.flops / self.gflops, self.bytes / self.gbytes) / 1e6

    def speedup(self, row: Row) -> float | None:
        """How many times as fast as the first row, by medians."""
        base = self.rows[0].median
        return base / row.median if base and row.median else None

    def share(self, row: Row) -> float | None:
        """The floor as a fraction of the median."""
        return self.floor / row.median if row.median else None

    def roofline(self) -> str:
        """One sentence: the floor and the ceilings it comes from."""
        return (
            f"floor {self.floor:.2f} ms: {self.flops / 1e9:.2f} GFLOP at {self.gflops:.0f} GFLOP/s ({self.source}), "
            f"{self.bytes / 1e6:.1f} MB at {self.gbytes:.0f} GB/s"
        )

    def broken(self) -> bool:
        """True if one of our runtimes is there and failed or was wrong."""
        failures = ("failed", "wrong")
        return any(row.ours and row.missing is not None and row.missing.startswith(failures) for row in self.rows)

    def lead(self) -> str:
        """One sentence: our best against the best competitor."""
        ours = [row for row in self.rows if row.ours and row.median]
        others = [row for row in self.rows if not row.ours and row.median]
        if not ours or not others:
            return "nothing to compare"
        first, second = (min(rows, key=lambda row: row.median or 0.0) for rows in (ours, others))
        ratio = (second.median or 0.0) / (first.median or 1.0)
        return f"{first.name} is {ratio:.2f} times as fast as {second.name}, the best of the others"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column heads and cells."""
        head = ["runtime", "median ms", "min ms", "speed-up", "max rel. error", "of roofline"]
        return head, [self._cells(row) for row in self.rows]

    def _cells(self, row: Row) -> list[str]:
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.median is None:
            return [row.name, row.missing or "not measured", "", "", error, ""]
        speedup = self.speedup(row)
        return [
            row.name,
            f"{row.median:.2f}",
            f"{row.minimum:.2f}",
            "" if speedup is None else f"{speedup:.2f}x",
            error,
            f"{self.share(row):.0%}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived figures included, as JSON values."""
        rows = [
            {
                **asdict(row),
                "median_ms": row.median,
                "min_ms": row.minimum,
                "speedup": self.speedup(row),
                "share_of_floor": self.share(row),
            }
            for row in self.rows
        ]
        ceilings = {"gflops": self.gflops, "gbytes": self.gbytes, "source": self.source}
        return {
            "case": asdict(self.case),
            "flops": self.flops,
            "bytes": self.bytes,
            "ceilings": ceilings,
            "floor_ms": self.floor,
            "rows": rows,
        }


@dataclass
class Report:
    """Several cases and where they were measured."""

    results: list[CaseResult]
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What a result file holds."""
        return {"provenance": self.provenance, "results": [result.as_dict() for result in self.results]}


def provenance() -> dict[str, Any]:
    """Command, commit, date, machine and versions of this run."""
    return {
        "command": shlex.join(["python", "-m", "mnv4_kernels", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": device.cpu_name(),
        "gpu": device.gpu_name(),
        "python": platform.python_version(),
        "versions": {name: device.version(name) for name in DISTRIBUTIONS},
    }


def _commit() -> str | None:
    """The checkout's commit, "-dirty" appended with local changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
