"""Tables on a terminal: with rich where it is installed, else plain text."""

from __future__ import annotations

import os
from collections.abc import Sequence


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table as text, one line a row, with `notes` below it."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return _plain(title, columns, rows, notes)
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(color_system=None)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # a log file has no edge to wrap at
        console.width = 160
    with console.capture() as capture:
        console.print(table)
        for note in notes:
            console.print(Text(note))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    rule = "-" * max(map(len, lines))
    return "\n".join([title, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:]), *notes])
