"""The command line: `python -m mnv4_kernels` and `mnv4-kernels`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, demo, info, run, tune, verify

COMMANDS = {"info": info, "demo": demo, "verify": verify, "bench": bench, "tune": tune, "run": run}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="mnv4-kernels", description="Fused kernels for timm's MobileNet-V4.", allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        # "name: what it does.", and perhaps more below
        description = (command.__doc__ or "").partition(": ")[2].strip()
        sub = commands.add_parser(name, help=description.splitlines()[0], description=description)
        command.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 where it could not be started."""
    arguments = parser().parse_args(argv)
    try:
        status: int = COMMANDS[arguments.command].main(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        print(f"`{arguments.command}` needs {missing}: pip install 'mnv4_kernels[demo]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"mnv4-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status
