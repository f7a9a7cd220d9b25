"""run: runs a Python script, timm's train.py for one, with every model that timm creates patched."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The script and what it is given."""
    parser.add_argument("script", help="path of a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the script")


def main(arguments: argparse.Namespace) -> int:
    """Runs the script as `__main__`; its exit status is the command's."""
    script = Path(arguments.script)
    if not script.is_file():
        raise ValueError(f"`script` must be a file, got {arguments.script!r}")
    import mnv4_kernels

    mnv4_kernels.patch_timm()
    sys.argv = [str(script), *arguments.arguments]
    # as the interpreter does for a script: its folder comes first
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0
