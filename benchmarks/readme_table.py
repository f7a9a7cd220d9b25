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
NOTHING = "No result file is in `benchmarks/results` yet.\n"


def table(files: list[Path]) -> str:
    """Markdown: for each file where it was measured, and a row a case."""
    sections = [_section(file) for file in files]
    return "\n".join(sections) or NOTHING


def _section(file: Path) -> str:
    data = json.loads(file.read_text())
    where = data["provenance"]
    results = data["results"]
    lines = [
        f"{where['cpu']}, torch {where['versions']['torch']}: milliseconds (median), and our best against the best "
        f"of the others ([all figures](benchmarks/results/{file.name})).",
    ]
    # cases that were measured with the same runtimes share a table
    for names in dict.fromkeys(_names(result) for result in results):
        lines += ["", f"| case | floor | {' | '.join(names)} | ours | commit |", f"|---|{'---|' * (len(names) + 3)}"]
        lines += [_row(result, names) for result in results if _names(result) == names]
    return "\n".join(lines) + "\n"


def _names(result: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row["name"] for row in result["rows"] if row["median_ms"])


def _row(result: dict[str, Any], names: tuple[str, ...]) -> str:
    case = result["case"]
    title = (
        f"{case['model'].removeprefix('mobilenetv4_')} {case['size']}px, batch {case['batch']}, {case['dtype']}, "
        f"{case['threads']} threads"
    )
    rows = {row["name"]: row for row in result["rows"]}
    times = [rows[name]["median_ms"] for name in names]
    ours = [row["median_ms"] for row in result["rows"] if row["ours"] and row["median_ms"]]
    others = [row["median_ms"] for row in result["rows"] if not row["ours"] and row["median_ms"]]
    ratio = f"{min(others) / min(ours):.2f}x" if ours and others else "-"
    cells = [f"{result['floor_ms']:.2f}", *(f"{time:.2f}" for time in times), ratio, result["made"]["commit"][:7]]
    return f"| {title} | {' | '.join(cells)} |"


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
