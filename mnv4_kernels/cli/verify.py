"""verify: compares a patched model with the unpatched one, block by block; exit status 1 if they differ."""

from __future__ import annotations

import argparse
import sys

import torch

from ..benchmark.case import DTYPES, create_input, create_model
from .arguments import add_case_arguments, cases_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and input."""
    add_case_arguments(parser, several=True)


def main(arguments: argparse.Namespace) -> int:
    """Patches each model, prints what was replaced and the errors found."""
    import mnv4_kernels

    status = 0
    for case in cases_of(arguments):
        torch.set_num_threads(case.threads)
        dtype = DTYPES[case.dtype]
        model, x = create_model(case).to(dtype), create_input(case).to(dtype)
        print(case.title)
        print(mnv4_kernels.patch(model))
        print()
        try:
            print(mnv4_kernels.verify(model, x))
        except AssertionError as error:
            print(error, file=sys.stderr)
            status = 1
    return status
