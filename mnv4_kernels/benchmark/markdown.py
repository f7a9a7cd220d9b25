"""A report as Markdown, to be pasted into an issue or a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .profiling import Profile
from .report import Report, fact


def render(report: Report) -> str:
    """A section a case, then how it was measured."""
    sections = []
    for result in report.results:
        notes = [*result.absent(), result.roofline(), result.lead()]
        sections.append(section(result.case.title, [table(*result.table()), *map(_escaped, notes)]))
    return "\n".join([*sections, origin(report.provenance)])


def render_profiles(profiles: Sequence[Profile]) -> str:
    """A section a profile: steps, blocks, and what the figures refer to."""
    return "\n".join(
        section(found.case.title, [table(*found.step_table()), table(*found.block_table()), _escaped(found.footnote())])
        for found in profiles
    )


def origin(provenance: Mapping[str, Any]) -> str:
    """The section that says how a result was measured."""
    return section("How this was measured", [table(["", ""], [[name, fact(it)] for name, it in provenance.items()])])


def section(title: str, paragraphs: Sequence[str]) -> str:
    """A heading and what stands below it."""
    return "\n\n".join([f"## {_escaped(title)}", *paragraphs]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are aligned right."""
    numbers = [all(cell[:1].isdigit() for cell in column if cell) for column in zip(*rows, strict=True)]
    ruler = ["---:" if number else "---" for number in numbers or [False] * len(head)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *([*map(_escaped, row)] for row in rows)))


def _escaped(text: str) -> str:
    """`text` with what Markdown would read as markup made harmless."""
    for mark in "\\`*_|<>":
        text = text.replace(mark, f"\\{mark}")
    return text
