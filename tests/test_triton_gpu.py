"""On a device: small calls, every call of models, every config of every kernel, graph replay, streams, large tensors.

With TRITON_INTERPRET=1 the same bodies run on CPU tensors, on fewer and smaller cases, so that a device is the first to
run as few of these lines as can be; `test_triton_interpreter.py` does that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("timm", reason="the shapes are read off timm's models")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_calls
from gpu_calls import FAMILIES, SMALL_CALLS, Example, family_examples, model_examples

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import tune
from mnv4_kernels.testing import outputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="there is no CUDA device"),
]

needs_device = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs, no streams and no 4 GB tensors")

#: how float32 is multiplied, and the error that may come of it, relative to the largest value: roundings of the
#: operands of products and of the result
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "ieee", 2**-6),
    "float16": (torch.float16, "ieee", 2**-9),
    "tf32": (torch.float32, "tf32", 2**-8),
    "float32": (torch.float32, "ieee", 2**-18),
}


@pytest.fixture(params=["float32"] if INTERPRETED else PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of `PRECISIONS`, with convolutions set to it."""
    flags: Any = torch.backends.cudnn
    before, flags.conv.fp32_precision = flags.conv.fp32_precision, PRECISIONS[request.param][1]
    yield request.param
    flags.conv.fp32_precision = before


def _check(call: Example, precision: str, configs: dict[str, Any] | None = None) -> None:
    result, launches, _ = tune.build((call.op, call.arguments), configs or {})
    for launch in launches:
        launch.run()
    wide = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in call.arguments]
    for found, wanted in zip(outputs(result), outputs(REFERENCES[call.op](*wide)), strict=True):
        assert found.shape == wanted.shape
        if not wanted.numel():
            continue
        error = float((found.double() - wanted).abs().max() / (wanted.abs().max() + 1e-12))
        assert error <= PRECISIONS[precision][2], f"{call.op} {call.role} {configs}: {error:.3g}"


@pytest.mark.parametrize("name", SMALL_CALLS)
def test_a_small_call_of_a_kernel_matches_float64(name: str, precision: str) -> None:
    _check(SMALL_CALLS[name](PRECISIONS[precision][0], DEVICE), precision)


@pytest.mark.parametrize("batch", [1] if INTERPRETED else [1, 17])
@pytest.mark.parametrize("model", ["conv_small_035", "hybrid_medium_075"])
def test_every_call_of_a_model_matches_float64(model: str, batch: int, precision: str) -> None:
    dtype = PRECISIONS[precision][0]
    size = 32 if INTERPRETED else 128
    found = list(model_examples(model, batch, dtype, DEVICE, size))
    # one of each op is what the interpreter has time for
    first = {call.op: call for call in reversed(found)}
    for call in first.values() if INTERPRETED else found:
        _check(call, precision)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Every candidate of every family in Triton's cache, by all processors: one by one they would take half an hour."""
    if INTERPRETED:
        return
    properties = torch.cuda.get_device_properties(0)
    target = (10 * properties.major + properties.minor, properties.multi_processor_count)
    parts = os.cpu_count() or 1
    jobs = [
        (family, dtype, part, parts)
        for family in FAMILIES
        for dtype in ("bfloat16", "float32")
        for part in range(parts)
    ]
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(gpu_calls.compile_candidates, *job, *target) for job in jobs]:
            # what does not compile, the tests will name
            job.result()


@pytest.mark.parametrize("dtype", ["bfloat16"] if INTERPRETED else ["bfloat16", "tf32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_config_of_a_kernel_matches_float64(family: str, dtype: str, compiled: None) -> None:
    ran = 0
    for call in family_examples(family, PRECISIONS[dtype][0], DEVICE, small=INTERPRETED):
        for key, first in tune.build((call.op, call.arguments), {})[2].items():
            tried = tune.candidates(first)
            for config in tried[:: len(tried) // 2] if INTERPRETED else tried:
                try:
                    _check(call, dtype, {key: config})
                except Exception as error:
                    # a tile for a larger device is no error of the kernel's
                    if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                        raise
                else:
                    ran += 1
    assert ran > 0


@needs_device
@pytest.mark.parametrize("name", SMALL_CALLS)
def test_a_captured_call_replays_on_new_values_as_the_op_on_another_stream_does(name: str) -> None:
    call = SMALL_CALLS[name](torch.bfloat16, DEVICE)
    op = getattr(torch.ops.mnv4_kernels, call.op)
    x, *rest = call.arguments
    op(x, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = op(x, *rest)
    torch.cuda.current_stream().wait_stream(stream)
    for found, wanted in zip(outputs(captured), outputs(elsewhere), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@needs_device
@pytest.mark.parametrize("name", SMALL_CALLS)
def test_the_same_call_gives_the_same_bits_again(name: str) -> None:
    call = SMALL_CALLS[name](torch.float32, DEVICE)
    op = getattr(torch.ops.mnv4_kernels, call.op)
    first, second = (outputs(op(*call.arguments)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_device
def test_offsets_beyond_two_to_the_31_are_addressed() -> None:
    from mnv4_kernels.ops.dwconv_bn_act.triton_dwconv_bn_act import dwconv_bn_act

    x = torch.zeros(2200, 1000, 32, 32, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[-1] = 1
    weight = torch.ones(1000, 1, 3, 3, dtype=torch.bfloat16, device="cuda")
    y = dwconv_bn_act(x, weight, None, None, [1, 1], [1, 1, 1, 1], [1, 1], "none")
    assert float(y[-1, :, 1:-1, 1:-1].min()) == 9
    assert float(y[-2].abs().max()) == 0
