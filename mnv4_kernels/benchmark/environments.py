"""Virtual environments of the competitors that can't share one with this package.

`python -m mnv4_kernels.benchmark.environments [--folder DIR] [NAME...]` makes them with pip, all by default.
What can't be installed is written down with pip's reason, which `bench` then shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

#: Where they are looked for unless `--environments` says otherwise.
FOLDER = Path.home() / ".cache" / "mnv4_kernels" / "environments"

#: Of converters; it reads what later versions export, and every converter below accepts it.
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """One row of the list."""

    name: str
    #: what pip installs
    requirements: tuple[str, ...]
    #: what is imported; where these are installed beside this package, no environment is needed
    modules: tuple[str, ...]

    def python(self, folder: Path) -> str | None:
        """The interpreter to use: the environment's, else this one if it has the modules, else None."""
        own = folder / self.name / "bin" / "python"
        if own.exists():
            return str(own)
        here = all(importlib.util.find_spec(module) is not None for module in self.modules)
        return sys.executable if here else None

    def missing(self, folder: Path) -> list[str]:
        """Why it can't be used, in words; empty if it can."""
        if self.python(folder) is not None:
            return []
        note = self._note(folder)
        if note.exists():
            return [f"{self.name} can't be installed: {note.read_text().strip()}"]
        return [f"{', '.join(self.modules)} not installed"]

    def create(self, folder: Path) -> str | None:
        """Makes it anew; returns None, or pip's reason why not."""
        home, note = folder / self.name, self._note(folder)
        note.unlink(missing_ok=True)
        venv.create(home, clear=True, with_pip=True)
        install = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", *self.requirements]
        result = subprocess.run(install, stderr=subprocess.PIPE, text=True)
        if result.returncode == 0:
            return None
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (errors[0] if errors else f"pip's exit status is {result.returncode}").removeprefix("ERROR: ")
        shutil.rmtree(home)
        note.write_text(reason + "\n")
        return reason

    def _note(self, folder: Path) -> Path:
        return folder / f"{self.name}.missing"


ONNX = Environment("onnx", (TORCH, "onnx", "onnxscript"), ("onnx", "onnxscript"))
ONNXRUNTIME = Environment("onnxruntime", ("onnxruntime", "numpy"), ("onnxruntime",))
OPENVINO = Environment("openvino", ("openvino", "numpy"), ("openvino",))
EXECUTORCH = Environment("executorch", (TORCH, "executorch"), ("executorch",))
LITERT = Environment("litert", (TORCH, "litert-torch", "ai-edge-litert"), ("litert_torch", "ai_edge_litert"))

ENVIRONMENTS = {row.name: row for row in (ONNX, ONNXRUNTIME, OPENVINO, EXECUTORCH, LITERT)}


def main() -> int:
    """Makes the environments; status 1 if one can't be made."""
    parser = argparse.ArgumentParser(description="Makes the virtual environments of bench's competitors.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"among: {', '.join(ENVIRONMENTS)} (default all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default {FOLDER}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"`NAME` must be among {', '.join(ENVIRONMENTS)}, got {unknown[0]!r}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.names or ENVIRONMENTS:
        reason = ENVIRONMENTS[name].create(arguments.folder)
        failed |= reason is not None
        print(f"{name}: {reason or 'installed'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
