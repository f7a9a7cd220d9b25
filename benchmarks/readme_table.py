"""Rewrites the README's results and a page of each file in benchmarks/results; `--check` only tells if they agree.

The page has every case, with the least times beside the medians; the README those with the most threads.
"""

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
LEAST = ("least of others", "least of ours", "its share")
NOTHING = "No result file is in `benchmarks/results` yet.\n"


def table(files: list[Path]) -> str:
    """Markdown for the README: the cases with the most threads of each file, and where its page is."""
    sections = []
    for file in files:
        results = json.loads(file.read_text())["results"]
        threads = max(result["case"]["threads"] for result in results)
        link = f"[all cases](benchmarks/results/{file.stem}.md)"
        sections.append(_section(file, [result for result in results if result["case"]["threads"] == threads], link))
    return "\n".join(sections) or NOTHING


def page(file: Path) -> str:
    """Markdown: every case of a result file."""
    results = json.loads(file.read_text())["results"]
    heading = (
        f"# {file.stem}\n\nWritten by `python benchmarks/readme_table.py`. The last three columns are of the "
        "fastest calls, which other work on the machine disturbed least.\n\n"
    )
    return heading + _section(file, results, f"[all figures]({file.name})", least=True)


def _section(file: Path, cases: list[dict[str, Any]], link: str, *, least: bool = False) -> str:
    """Where it was measured, and a table for each dtype and number of threads, a row a case."""
    where = json.loads(file.read_text())["provenance"]
    results = sorted(cases, key=_order)
    lines = [
        f"{file.stem}: {where['cpu']}, torch {where['versions']['torch']}: milliseconds, medians over rounds. *Best "
        "other* is the fastest of what is not ours, in brackets of how many; *share* is the floor over the better of "
        f"ours; the last column is that one's lead, with its interval ({link})."
    ]
    columns = COLUMNS + (LEAST if least else ())
    for kind in dict.fromkeys(map(_kind, results)):
        lines += ["", f"| {kind} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines += [_row(result, least) for result in results if _kind(result) == kind]
    return "\n".join(lines) + "\n"


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    case = result["case"]
    return case["dtype"] != "float32", -case["threads"], _name(result), case["size"], case["batch"]


def _kind(result: dict[str, Any]) -> str:
    threads = result["case"]["threads"]
    return f"{result['case']['dtype']}, {threads} thread{'s' if threads > 1 else ''}"


def _name(result: dict[str, Any]) -> str:
    return str(result["case"]["model"].removeprefix("mobilenetv4_"))


def _row(result: dict[str, Any], least: bool) -> str:
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
    if least:
        others = {name: row["min_ms"] for name, row in rows.items() if not row["ours"]}
        ours = min((row["min_ms"] for row in rows.values() if row["ours"]), default=None)
        cells += [
            f"{min(others, key=lambda name: others[name])} {min(others.values()):.2f}" if others else "-",
            f"{ours:.2f}" if ours else "-",
            f"{result['floor_ms'] / ours:.0%}" if ours else "-",
        ]
    return f"| {' | '.join(cells)} |"


def rewritten(readme: str, content: str) -> str:
    """`readme` with `content` between the markers; raises `ValueError` where they are missing."""
    if START not in readme or END not in readme:
        raise ValueError(f"the README must contain {START.strip()!r} and {END!r}")
    head, _, rest = readme.partition(START)
    return head + START + content + END + rest.partition(END)[2]


def main() -> int:
    """Rewrites the README and the pages, or with `--check` returns 1 if that would change one."""
    files = sorted(RESULTS.glob("*.json"))
    readme = ROOT / "README.md"
    wanted = {readme: rewritten(readme.read_text(), table(files))}
    wanted |= {file.with_suffix(".md"): page(file) for file in files}
    if "--check" in sys.argv[1:]:
        return int(any(not path.exists() or path.read_text() != text for path, text in wanted.items()))
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
