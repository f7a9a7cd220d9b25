"""On a device: every config of every kernel, graph replay, streams, and large tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("timm", reason="the shapes are read off timm's models")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu_shapes import Call, blocks, calls

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

#: rounding of the operands of products and of the result, relative to the largest value
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-8}


def _calls(model: str, batch: int, dtype: torch.dtype) -> list[Call]:
    found = {}
    for block in blocks(model, batch, 128):
        for call in calls(block, dtype, "cuda"):
            shapes = tuple(tuple(v.shape) if torch.is_tensor(v) else str(v) for v in call.arguments)
            found.setdefault((call.op, shapes), call)
    return list(found.values())


def _check(call: Call, configs: dict[str, object]) -> None:
    result, launches, _ = tune.build((call.op, call.arguments), configs)
    for launch in launches:
        launch.run()
    wide = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in call.arguments]
    expected = REFERENCES[call.op](*wide)
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for found, wanted in pairs:
        error = (found.double() - wanted).abs().max() / (wanted.abs().max() + 1e-12)
        assert error <= TOLERANCE[found.dtype], f"{call.op} {call.role} {configs}: {error:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model", ["conv_small_035", "hybrid_medium_075"])
@pytest.mark.parametrize("batch", [1, 17])
def test_every_call_of_a_model_matches_float64(model: str, batch: int, dtype: torch.dtype) -> None:
    for call in _calls(model, batch, dtype):
        _check(call, {})


def test_every_config_of_every_kernel_matches_float64() -> None:
    seen = set()
    for call in _calls("hybrid_medium_075", 2, torch.bfloat16):
        for key, first in tune.build((call.op, call.arguments), {})[2].items():
            # one shape of each kernel and depthwise geometry
            kind = (call.op, key.rpartition("/")[2] if "dwconv" in key else "")
            if kind in seen:
                continue
            seen.add(kind)
            for config in tune.candidates(first):
                try:
                    _check(call, {key: config})
                except Exception as error:
                    if type(error).__name__ != "OutOfResources":
                        raise


def test_a_captured_call_replays_on_new_values() -> None:
    (call,) = [call for call in _calls("conv_small_035", 2, torch.bfloat16) if call.op == "dwconv_bn_act"][:1]
    op = getattr(torch.ops.mnv4_kernels, call.op)
    x, *rest = call.arguments
    op(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, op(x, *rest), rtol=0, atol=0)


def test_offsets_beyond_two_to_the_31_are_addressed() -> None:
    from mnv4_kernels.ops.dwconv_bn_act.triton_dwconv_bn_act import dwconv_bn_act

    x = torch.zeros(2200, 1000, 32, 32, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[-1] = 1
    weight = torch.ones(1000, 1, 3, 3, dtype=torch.bfloat16, device="cuda")
    y = dwconv_bn_act(x, weight, None, None, [1, 1], [1, 1, 1, 1], [1, 1], "none")
    assert float(y[-1, :, 1:-1, 1:-1].min()) == 9
    assert float(y[-2].abs().max()) == 0
