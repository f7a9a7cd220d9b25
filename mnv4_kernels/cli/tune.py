"""tune: times launch configurations of the GPU kernels for models, on this machine's GPU, and writes the fastest.

The file is used where MNV4_KERNELS_TUNED names it. A run that is called again with the same file goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from ..backends import cuda
from ..benchmark.case import DTYPES, Case, create_input, create_model
from .arguments import add_case_arguments, cases_of, output_file
from .console import progress

#: where models are tuned; a test that has no GPU says otherwise
DEVICE = "cuda"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, inputs, and where the result goes."""
    add_case_arguments(parser, several=True)
    parser.add_argument(
        "--out", type=output_file, required=True, metavar="FILE", help="JSON; rows that it has are kept"
    )


def main(arguments: argparse.Namespace) -> int:
    """Tunes what patched models call; exit status 1 if a configuration gave another result than the heuristic's."""
    if why_not := cuda.reasons():
        raise ValueError(f"tuning needs a GPU that the Triton kernels run on: {'; '.join(why_not)}")
    from ..benchmark.report import provenance
    from ..ops.gpu import tune

    where, ceilings = provenance(), tune.ceilings()
    failures: list[str] = []
    with progress() as show:
        for case in cases_of(arguments):
            show(f"tuning {case.title}")
            failures += tune.tune(
                calls_of(case),
                arguments.out,
                command=where["command"],
                commit=where["commit"] or f"mnv4_kernels {where['versions']['mnv4_kernels']}",
                ceilings=ceilings,
            )
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if any("another result" in failure for failure in failures) else 0


def calls_of(case: Case) -> list[Any]:
    """The op calls of a case's patched model on the GPU, where whole blocks are one call."""
    import mnv4_kernels

    from ..ops.gpu.tune import record

    torch.set_num_threads(case.threads)
    model = create_model(case).to(DEVICE, DTYPES[case.dtype])
    mnv4_kernels.patch(model)
    with torch.no_grad(), record() as calls:
        model(create_input(case).to(DEVICE, DTYPES[case.dtype]))
    return calls
