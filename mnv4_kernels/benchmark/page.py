"""A report as one HTML page: tables and a bar plot, without any other file."""

from __future__ import annotations

from html import escape

from .report import CaseResult, Report, fact

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.point { fill: #c4451c; fill-opacity: .6; } .roof { stroke: #222; fill: none; } .grid { stroke: #ddd; }
.ours { fill: #c4451c; } .theirs { fill: #8899aa; } .floor { stroke: #222; stroke-dasharray: 4 3; }
svg text { font: 13px system-ui, sans-serif; }
"""

_LABEL, _BAR, _VALUE, _PITCH = 190, 480, 90, 26


def render(report: Report) -> str:
    """The page."""
    sections = "\n".join(_section(result) for result in report.results)
    facts = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(fact(value))}</td></tr>" for name, value in report.provenance.items()
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>mnv4_kernels bench</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>mnv4_kernels bench</h1>\n{sections}\n"
        f"<h2>How this was measured</h2>\n<table>{facts}</table>\n</body></html>\n"
    )


def _section(result: CaseResult) -> str:
    head, rows = result.table()
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    absent = "".join(f"<li>{escape(line)}</li>" for line in result.absent())
    return (
        f"<h2>{escape(result.case.title)}</h2>\n{plot(result)}\n"
        f"<table><tr>{heads}</tr>{body}</table>\n<ul>{absent}</ul>\n"
        f"<p>{escape(result.roofline())}. {escape(result.lead())}.</p>"
    )


def plot(result: CaseResult) -> str:
    """An SVG: a bar for each timed runtime's median, and a dashed line at the floor."""
    timed = [(row, row.median) for row in result.rows if row.median]
    longest = max((median for _, median in timed), default=1.0)
    height = _PITCH * len(timed) + 10
    parts = [f"<svg role='img' width='{_LABEL + _BAR + _VALUE}' height='{height}'>"]
    for index, (row, median) in enumerate(timed):
        top, width = _PITCH * index, _BAR * median / longest
        kind = "ours" if row.ours else "theirs"
        parts.append(f"<text x='{_LABEL - 8}' y='{top + 17}' text-anchor='end'>{escape(row.name)}</text>")
        parts.append(f"<rect class='{kind}' x='{_LABEL}' y='{top + 3}' width='{width:.1f}' height='{_PITCH - 6}'/>")
        parts.append(f"<text x='{_LABEL + width + 6:.1f}' y='{top + 17}'>{median:.2f} ms</text>")
    floor = _LABEL + _BAR * min(result.floor / longest, 1.0)
    parts.append(f"<line class='floor' x1='{floor:.1f}' x2='{floor:.1f}' y1='0' y2='{height}'/></svg>")
    return "".join(parts)
