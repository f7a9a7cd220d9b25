"""Tables as text that stay readable at any width."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence

#: Where there is no terminal and no COLUMNS: a log file has no edge to wrap at.
NO_EDGE = 160

_NUMBER = re.compile(r"[+-]?\d[\d.]*(e[+-]?\d+)?[%x]?")
_GAP = "  "
_INDENT = " " * 4


def render(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """A table, one line a row where that fits; else the last columns go below each row, indented and wrapped.

    Args:
        title: the first line; "" for none.
        columns: heads; a column of numbers is aligned right.
        rows: cells, as many a row as there are columns.
        notes: paragraphs below the table.
        width: of the lines; None: the terminal's.
    """
    if width is None:
        width = shutil.get_terminal_size((NO_EDGE, 24)).columns
    shown = len(columns)
    while shown > 1 and max(map(len, _lines(columns, rows, shown))) > width:
        shown -= 1
    head, *lines = _lines(columns, rows, shown)
    parts = [title] if title else []
    parts += [head, "-" * max(len(line) for line in (head, *lines))]
    for line, row in zip(lines, rows, strict=True):
        parts.append(line)
        parts += [_wrapped(cell, width, _INDENT) for cell in row[shown:] if cell]
    return "\n".join([*parts, *(_wrapped(note, width, "") for note in notes)])


def paragraph(text: str, width: int | None = None) -> str:
    """`text` broken at the terminal's edge, or at `width`; later lines are indented."""
    return textwrap.fill(
        text,
        width or shutil.get_terminal_size((NO_EDGE, 24)).columns,
        subsequent_indent=_GAP,
        break_on_hyphens=False,
    )


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]], shown: int) -> list[str]:
    """The heads and a line a row, of the first `shown` columns."""
    widths, marks = [], []
    for index in range(shown):
        cells = [row[index] for row in rows]
        widths.append(max(map(len, (columns[index], *cells))))
        numbers = [cell for cell in cells if cell]
        marks.append(">" if numbers and all(_NUMBER.fullmatch(cell) for cell in numbers) else "<")
    return [
        _GAP.join(
            f"{cell:{mark}{width}}" for cell, mark, width in zip(row[:shown], marks, widths, strict=True)
        ).rstrip()
        for row in (columns, *rows)
    ]
