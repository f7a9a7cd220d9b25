"""What a measurement found: rows, JSON with provenance, and a page with a plot."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..backends import device
from .case import Case
from .foreign.player import energy
from .intervals import Ratio, ratio, spread

DISTRIBUTIONS = ("mnv4_kernels", "torch", "triton", "timm", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Turn:
    """One runtime's calls in one round: milliseconds, and joules of a call where the machine tells."""

    calls: int
    minimum: float
    lower: float
    median: float
    upper: float
    joules: float | None = None


@dataclass
class Row:
    """One runtime in one case."""

    name: str
    ours: bool = False
    #: one a round
    turns: list[Turn] = field(default_factory=list)
    #: largest difference from eager float64 over the largest magnitude, and the same from eager float32
    error: float | None = None
    error_float32: float | None = None
    #: the most that the process held while it ran and while it loaded, beyond what it held with the runtime imported
    memory_mb: float | None = None
    loading_mb: float | None = None
    #: of a training step: activations that are kept for the backward
    saved_mb: float | None = None
    #: of a runtime in an environment of its own
    version: str | None = None
    #: why there is no time
    missing: str | None = None

    @property
    def medians(self) -> list[float]:
        """Milliseconds, a round each."""
        return [turn.median for turn in self.turns]

    @property
    def median(self) -> float | None:
        """Milliseconds: the median over rounds of a round's median."""
        return statistics.median(self.medians) if self.turns else None

    @property
    def minimum(self) -> float | None:
        """Milliseconds of the fastest call."""
        return min(turn.minimum for turn in self.turns) if self.turns else None

    @property
    def joules(self) -> float | None:
        """Of one call; None where the machine does not tell."""
        told = [turn.joules for turn in self.turns if turn.joules is not None]
        return statistics.median(told) if told else None


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
    #: commit and date
    made: dict[str, Any] = field(default_factory=dict)

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

    def best(self, ours: bool) -> Row | None:
        """The fastest of ours, or of the others; None if none was timed."""
        return min(
            (row for row in self.rows if row.ours == ours and row.turns),
            key=lambda row: row.median or 0.0,
            default=None,
        )

    def ratio(self) -> Ratio | None:
        """Our best against the best of the others; None without the one or the other."""
        ours, theirs = self.best(True), self.best(False)
        return ratio(theirs.medians, ours.medians) if ours and theirs else None

    def lead(self) -> str:
        """One sentence: our best against the best competitor."""
        ours, theirs, found = self.best(True), self.best(False), self.ratio()
        if ours is None or theirs is None or found is None:
            return "nothing to compare"
        if not found.differs:
            return f"no difference between {ours.name} and {theirs.name}, the best of the others: {found}"
        if found.value < 1:
            lost = ratio(ours.medians, theirs.medians)
            return f"{theirs.name}, the best of the others, is {lost} times as fast as {ours.name}"
        return f"{ours.name} is {found} times as fast as {theirs.name}, the best of the others"

    def images_per_second(self, row: Row) -> float | None:
        """Throughput by the median."""
        return self.case.batch / row.median * 1e3 if row.median else None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column heads and cells of what was timed; but for a step's last column at most 80 characters wide."""
        head = ["runtime", "ms", "+-", "img/s", "MB", "speed-up", "error", "floor"]
        timed = [row for row in self.rows if row.turns]
        cells = [self._cells(row) for row in timed]
        if self.case.train:
            saved = ["" if row.saved_mb is None else f"{row.saved_mb:.0f}" for row in timed]
            return [*head, "saved"], [[*line, cell] for line, cell in zip(cells, saved, strict=True)]
        return head, cells

    def absent(self) -> list[str]:
        """A line for each runtime without a time: its name and why."""
        return [f"{row.name}: {row.missing or 'not measured'}" for row in self.rows if not row.turns]

    def _cells(self, row: Row) -> list[str]:
        speedup, share, images = self.speedup(row), self.share(row), self.images_per_second(row)
        return [
            row.name,
            f"{row.median:.2f}",
            f"{spread(row.medians):.0%}",
            f"{images:.0f}" if images is None or images >= 10 else f"{images:.1f}",
            "" if row.memory_mb is None else f"{row.memory_mb:.0f}",
            "" if speedup is None else f"{speedup:.2f}x",
            "" if row.error is None else f"{row.error:.0e}",
            f"{share:.0%}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived figures included, as JSON values."""
        rows = [
            {
                **asdict(row),
                "median_ms": row.median,
                "min_ms": row.minimum,
                "spread": spread(row.medians),
                "images_per_second": self.images_per_second(row),
                "joules": row.joules,
                "speedup": self.speedup(row),
                "share_of_floor": self.share(row),
            }
            for row in self.rows
        ]
        found = self.ratio()
        return {
            "case": asdict(self.case),
            "flops": self.flops,
            "bytes": self.bytes,
            "ceilings": {"gflops": self.gflops, "gbytes": self.gbytes, "source": self.source},
            "floor_ms": self.floor,
            "ratio": None if found is None else asdict(found),
            "made": self.made,
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """What `as_dict` wrote; raises `ValueError` on a file of another format."""
        # files of before it was counted have no `saved_mb`
        stored = {entry.name for entry in fields(Row)} - {"saved_mb"}
        try:
            rows = [
                Row(
                    **{**{name: row[name] for name in stored}, "turns": [Turn(**turn) for turn in row["turns"]]},
                    saved_mb=row.get("saved_mb"),
                )
                for row in values["rows"]
            ]
            return cls(
                Case(**values["case"]), values["flops"], values["bytes"], **values["ceilings"], rows=rows,
                made=values["made"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(f"a result must have the fields that bench writes, got another format: {error}") from error


@dataclass
class Report:
    """Several cases and where they were measured."""

    results: list[CaseResult]
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What a result file holds."""
        return {"provenance": self.provenance, "results": [result.as_dict() for result in self.results]}

    def write(self, path: Path) -> None:
        """As JSON, a turn a line; `path` is whole at any time."""
        text = json.dumps(self.as_dict(), indent=1)
        # a turn's numbers in one line: rows can be read and compared
        text = re.sub(r"\{[^{}\[\]]*\"calls\"[^{}]*\}", lambda turn: " ".join(turn[0].split()), text)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text + "\n")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote; raises `ValueError`."""
        values = json.loads(path.read_text())
        return cls([CaseResult.from_dict(result) for result in values["results"]], values["provenance"])

    def has(self, case: Case, names: list[str]) -> bool:
        """True if `case` is there with all these runtimes."""
        return any(result.case == case and set(names) <= {row.name for row in result.rows} for result in self.results)

    def add(self, result: CaseResult) -> None:
        """Appends `result`, in place of an earlier one of the same case."""
        self.results = [*(kept for kept in self.results if kept.case != result.case), result]


def regressions(now: Report, before: Report) -> list[str]:
    """A sentence for each of our rows that lost against a competitor measured beside it, then and now.

    Ratios within a run are compared, not times, so that another or a busier machine is no regression: ours lost if
    the interval of today's ratio lies wholly below the interval of then.
    """
    found: list[str] = []
    earlier = {result.case: {row.name: row for row in result.rows if row.turns} for result in before.results}
    for result in now.results:
        known = earlier.get(result.case, {})
        rows = [row for row in result.rows if row.turns and row.name in known]
        for reference in (row for row in rows if not row.ours):
            for row in (row for row in rows if row.ours):
                then = ratio(known[reference.name].medians, known[row.name].medians)
                today = ratio(reference.medians, row.medians)
                if today.high < then.low:
                    found.append(f"{result.case.title}: {row.name} over {reference.name} was {then}, is {today}")
    return found


def made_now() -> dict[str, Any]:
    """Commit and date, kept with each case because a file may be written in several runs."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def provenance() -> dict[str, Any]:
    """Command, commit, date, machine and versions of this run; absolute paths by their last names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", "mnv4_kernels", *words]),
        **made_now(),
        "cpu": device.cpu_name(),
        "gpu": device.gpu_name(),
        "energy": "RAPL of the processor's package" if energy() is not None else "not reported by this machine",
        "python": platform.python_version(),
        "versions": {name: device.version(name) for name in DISTRIBUTIONS},
    }


def fact(value: object) -> str:
    """An entry of the provenance in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {version or 'not installed'}" for name, version in value.items())
    return "none" if value is None else str(value)


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
