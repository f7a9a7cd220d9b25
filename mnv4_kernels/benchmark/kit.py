"""What a case's runtimes read: input, references, and the model in every format; kept from run to run if asked."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from ..backends import device
from .case import Case
from .runtimes import Foreign
from .worker import PROGRAM

#: Changes with what `case.create_model` makes of a seed.
WEIGHTS = "adapted"

CONVERTER = Path(__file__).parent / "foreign" / "converter.py"


class ConversionError(RuntimeError):
    """A converter failed; its last words."""


class Kit:
    """A folder for a model, its batch and its image size, whatever the threads and the dtype.

    Args:
        case: resolved.
        cache: where kits are kept under names that tell versions; None: for as long as the `with` block.
    """

    def __init__(self, case: Case, cache: Path | None) -> None:
        self._temporary = tempfile.TemporaryDirectory() if cache is None else None
        if cache is None:
            assert self._temporary is not None
            self.folder = Path(self._temporary.name)
        else:
            versions = "-".join(f"{name}{device.version(name)}" for name in ("torch", "timm"))
            kind = ("-photo" if case.photo else "") + ("-train" if case.train else "")
            name = f"{case.model}-{case.size}px-batch{case.batch}-seed{case.seed}{kind}"
            self.folder = cache / f"{name}-{WEIGHTS}-{versions}"
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Kit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def convert(self, foreign: Foreign, environments: Path) -> None:
        """Writes `foreign`'s file unless it is there; raises `ConversionError`."""
        path = self.folder / foreign.file
        if path.exists():
            return
        python = foreign.converter.python(environments)
        assert python is not None, "a runtime that is missing is not converted for"
        command = [python, str(CONVERTER), str(self.folder / PROGRAM), str(path)]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            words = result.stderr.strip().splitlines()
            raise ConversionError(words[-1] if words else f"exit status {result.returncode}")
