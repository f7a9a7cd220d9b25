"""Options that several commands share."""

from __future__ import annotations

import argparse

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
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="images (default 1)")
    parser.add_argument("--size", type=_positive, default=0, metavar="PX", help="side of the image (default: timm's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), nargs="+", default=["float32"])
    parser.add_argument("--threads", type=_positive, nargs="+", default=[device.usable_cpus()], metavar="N")


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
