"""Progress, with rich where it is installed and as plain lines where not."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

HAS_RICH = importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on stderr: a spinner on a terminal, else a line each."""
    if HAS_RICH and sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(text)
    else:
        yield lambda text: print(text, file=sys.stderr, flush=True)
