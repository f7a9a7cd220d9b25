"""Rewrites the README's results from the files in benchmarks/results; `--check` only tells whether they agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- results: written by benchmarks/readme_table.py -->\n"
END = "<!-- end of results -->"
COLUMNS = ("floor", "best other", "ours patched", "ours optimized", "share", "lead")
NOTHING = "No result file is in `benchmarks/results` yet.\n"


def table(files: list[Path]) -> str:
    """Markdown: for each file where it was measured, a table for each dtype and number of threads, a row a case."""
    sections = [_section(file) for file in files]
    return "\n".join(sections) or NOTHING


def _section(file: Path) -> str:
    data = json.loads(file.read_text())
    where = data["provenance"]
    results = sorted(data["results"], key=_order)
    lines = [
        f"{where['cpu']}, torch {where['versions']['torch']}: milliseconds, medians over rounds. *Best other* is the "
        "fastest of what is not ours, in brackets of how many; *share* is the floor over the better of ours; the last "
        f"column is that one's lead, with its interval ([all figures](benchmarks/results/{file.name}))."
    ]
    for kind in dict.fromkeys(map(_kind, results)):
        lines += ["", f"| {kind} | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
        lines += [_row(result) for result in results if _kind(result) == kind]
    return "\n".join(lines) + "\n"


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    case = result["case"]
    return case["dtype"] != "float32", -case["threads"], _name(result), case["size"], case["batch"]


def _kind(result: dict[str, Any]) -> str:
    threads = result["case"]["threads"]
    return f"{result['case']['dtype']}, {threads} thread{'s' if threads > 1 else ''}"


def _name(result: dict[str, Any]) -> str:
    return str(result["case"]["model"].removeprefix("mobilenetv4_"))


def _row(result: dict[str, Any]) -> str:
    case = result["case"]
    rows = {row["name"]: row for row in result["rows"] if row["median_ms"]}
    others = {name: row["median_ms"] for name, row in rows.items() if not row["ours"]}
    best = min(others, key=lambda name: others[name], default=None)
    fastest = min((row["median_ms"] for row in rows.values() if row["ours"]), default=None)
    ratio = result["ratio"]
    cells = [
        f"{_name(result)} {case['size']}px, batch {case['batch']}",
        f"{result['floor_ms']:.2f}",
        f"{best} {others[best]:.2f} ({len(others)})" if best else "-",
        *(f"{rows[name]['median_ms']:.2f}" if name in rows else "-" for name in ("ours patched", "ours optimized")),
        f"{result['floor_ms'] / fastest:.0%}" if fastest else "-",
        f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
    ]
    return f"| {' | '.join(cells)} |"


def rewritten(readme: str, content: str) -> str:
    """`readme` with `content` between the markers; raises `ValueError` where they are missing."""
    if START not in readme or END not in readme:
        raise ValueError(f"the README must contain {START.strip()!r} and {END!r}")
    head, _, rest = readme.partition(START)
    return head + START + content + END + rest.partition(END)[2]


def main() -> int:
    """Rewrites the README, or with `--check` returns 1 if that would change it."""
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rewritten(before, table(sorted(RESULTS.glob("*.json"))))
    if "--check" in sys.argv[1:]:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
