"""demo: classifies a photograph with a patched model, shows the agreement with timm, and times both."""

from __future__ import annotations

import argparse
import copy

import torch

from ..benchmark.case import DTYPES, Case, create_input, create_model
from ..tables import render as table
from .arguments import add_case_arguments, cases_of
from .bench import print_result
from .console import progress

RUNTIMES = ["eager", "torch.compile", "ours patched", "ours optimized"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and input."""
    add_case_arguments(parser, several=True, default="mobilenetv4_conv_small")


def main(arguments: argparse.Namespace) -> int:
    """Patches, classifies, compares, times; status 1 if the classes disagree or a runtime failed."""
    from ..benchmark.rounds import Protocol, measure
    from ..benchmark.runtimes import select

    status = 0
    for case in cases_of(arguments, photo=True):
        torch.set_num_threads(case.threads)
        if not classify(case):
            status = 1
        with progress() as show:
            result = measure(case, select(RUNTIMES), Protocol(rounds=5), show)
        print_result(result)
        if result.broken():
            status = 1
    return status


def classify(case: Case) -> bool:
    """Prints the top classes of timm's model and of the patched one; True if they are the same."""
    import mnv4_kernels

    dtype = DTYPES[case.dtype]
    model, x = create_model(case).to(dtype), create_input(case).to(dtype)
    patched = copy.deepcopy(model)
    report = mnv4_kernels.patch(patched)
    with torch.no_grad():
        expected, logits = model(x), patched(x)
    print(report)
    print()
    theirs, ours = expected[0].topk(5), logits[0].topk(5)
    columns = zip(
        theirs.indices.tolist(), theirs.values.tolist(), ours.indices.tolist(), ours.values.tolist(), strict=True
    )
    rows = [[f"class {a}", f"{b:.5f}", f"class {c}", f"{d:.5f}"] for a, b, c, d in columns]
    title = f"{case.model} (random weights) on scikit-learn's china.jpg"
    print(table(title, ["timm", "logit", "patched", "logit"], rows))
    same = theirs.indices.tolist() == ours.indices.tolist()
    print(f"the five best classes {'agree' if same else 'DISAGREE'}")
    return same
