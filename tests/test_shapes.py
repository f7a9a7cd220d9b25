"""The calls kept in benchmarks/calls are those that timm's models make."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

timm = pytest.importorskip("timm")

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import shapes  # noqa: E402

from mnv4_kernels.benchmark.case import default_size  # noqa: E402
from mnv4_kernels.benchmark.flops import count_flops  # noqa: E402

MODELS = timm.list_models("mobilenetv4_*")


@pytest.mark.parametrize("model", MODELS)
def test_the_kept_calls_are_those_that_timm_makes(model: str) -> None:
    with shapes.file_of(model).open() as file:
        provenance, *kept = [next(file), *csv.reader(file)]
    calls = shapes.call_shapes(model)
    assert shapes.kept_calls(model) == calls
    assert kept == list(shapes.to_rows(calls)), (
        f"timm {timm.__version__} makes other calls than the file has ({provenance.strip()}): "
        "run `python benchmarks/shapes.py` and read the difference"
    )
    assert shapes.kept_calls(model) == calls


def test_each_model_has_its_file_and_no_other_is_there() -> None:
    assert {path.name for path in shapes.FOLDER.iterdir()} == {shapes.file_of(model).name for model in MODELS}


@pytest.mark.parametrize("model", ["mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"])
def test_the_calls_account_for_every_multiplication_but_the_classifiers(model: str) -> None:
    import torch

    with torch.device("meta"):
        network = timm.create_model(model)
    size = default_size(model)
    total = 0
    for call in shapes.call_shapes(model):
        height, width = call.size
        if call.heads:
            total += call.count * 2 * call.heads * height * width * (call.channels + call.outputs)
            continue
        inputs = 1 if call.op in ("dwconv_bn_act", "kv_downsample") else call.channels
        positions = -(-height // call.stride[0]) * -(-width // call.stride[1])
        total += call.count * 2 * positions * call.outputs * inputs * call.kernel[0] * call.kernel[1]
    classifier = 2 * network.classifier.in_features * network.classifier.out_features
    assert total + classifier == count_flops(network, (1, 3, size, size))
