"""Tables and progress, with rich where it is installed and as plain text where not."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

HAS_RICH = importlib.util.find_spec("rich") is not None


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: bool = True) -> None:
    """Prints a table to stdout; the columns behind the first are aligned right if they hold `numbers`."""
    if HAS_RICH and sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(head):
            table.add_column(column, justify="right" if index and numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        print(plain_table(head, rows, title, numbers))


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", numbers: bool = True) -> str:
    """The same as text; a cell that nothing follows in its row (a sentence) widens no column."""
    widths = [len(column) for column in head]
    for row in rows:
        last = max((index for index, cell in enumerate(row) if cell), default=0)
        for index, cell in enumerate(row):
            if index < last or (index and index == len(head) - 1 and numbers):
                widths[index] = max(widths[index], len(cell))
    lines = [title] if title else []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [f"{cell:{'>' if index and numbers else '<'}{widths[index]}}" for index, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """`text` broken at the terminal's edge, 120 at most; later lines are indented."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on stderr: a spinner on a terminal, else a line each."""
    if HAS_RICH and sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(text)
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)
