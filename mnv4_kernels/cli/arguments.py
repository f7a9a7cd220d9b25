"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..backends import device
from ..benchmark.case import DTYPES, Case

PREFIX = "mobilenetv4_"


def add_case_arguments(parser: argparse.ArgumentParser, several: bool, default: str | None = None) -> None:
    """Model names and the options of a `Case`."""
    count = "*" if default else "+" if several else 1
    parser.add_argument(
        "models",
        nargs=count,
        default=[default] if default else None,
        metavar="MODEL",
        help=f"names of timm's; `{PREFIX}` may be left out; `all`: every {PREFIX}*"
        + (f" (default {default})" if default else ""),
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1], metavar="N", help="images (default 1)")
    parser.add_argument(
        "--size", type=positive_int, default=0, metavar="PX", help="side of the image (default: timm's)"
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        nargs="+",
        default=["float32"],
        metavar="DTYPE",
        help=f"among: {', '.join(sorted(DTYPES))} (default float32)",
    )
    threads = device.usable_cpus()
    parser.add_argument(
        "--threads", type=positive_int, nargs="+", default=[threads], metavar="N", help=f"(default here: {threads})"
    )


def cases_of(arguments: argparse.Namespace, photo: bool = False) -> list[Case]:
    """One case per model, batch size, dtype and number of threads; raises `ValueError` on a model unknown to timm."""
    import timm

    every = timm.list_models(PREFIX + "*")
    names: list[str] = []
    for name in arguments.models:
        full = name if name.startswith(PREFIX) or name in timm.list_models() else PREFIX + name
        if name != "all" and full not in timm.list_models():
            raise ValueError(f"`MODEL` must be one of timm's ({', '.join(every)}) or all, got {full!r}")
        names += every if name == "all" else [full]
    return [
        Case(name, batch, arguments.size, dtype, threads, photo, train=getattr(arguments, "train", False)).resolved()
        for name in names
        for batch in arguments.batch
        for dtype in arguments.dtype
        for threads in arguments.threads
    ]


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def duration(text: str) -> float:
    """For argparse: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    # written so that NaN is refused as well
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def output_file(text: str) -> Path:
    """For argparse: a file that can be written later; what takes minutes should not end in a wrong path."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def input_file(text: str) -> Path:
    """For argparse: a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text!r}")
    return path
