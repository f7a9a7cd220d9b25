"""Models on a GPU: twelve against eager and float64, and optimized ones across streams, threads, copies and shapes.

Each test also runs on CPU tensors that are taken for a GPU's, by the references and a recorder that replays by running
again, so that a device meets no line of it first.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from gpus import DEVICES, Tape, pretend
from models import HYBRID, NAMES, SMALL, assert_as_exact, assert_patched_is_as_exact, convolutions, create, double_of
from models import images as images_on_cpu

import mnv4_kernels as mk
from mnv4_kernels.engine import gpu

#: (dtype, what float32 convolutions are multiplied in)
PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
}

#: (device, model, precision); test_gpu_plan runs all models without a device
MODELS = [
    *(("pretended", name, "float32") for name in (SMALL, HYBRID)),
    *(pytest.param("cuda", name, precision, marks=DEVICES[1].marks) for name in NAMES for precision in PRECISIONS),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where models and images go; "cpu" is taken for a GPU."""
    if request.param == "pretended":
        pretend(monkeypatch)
        monkeypatch.setattr(gpu.GraphedNetwork, "_recorder", lambda network: Tape())
    with torch.no_grad():
        yield "cpu" if request.param == "pretended" else request.param


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of the model, with float32 convolutions set as its name in `PRECISIONS` says."""
    flags: Any = torch.backends.cudnn
    before, flags.conv.fp32_precision = flags.conv.fp32_precision, PRECISIONS[request.param][1]
    yield PRECISIONS[request.param][0]
    flags.conv.fp32_precision = before


def images(device: str, *shape: int, seed: int = 1) -> torch.Tensor:
    """Random images; two of 3 x 64 x 64 unless told otherwise."""
    return images_on_cpu(*shape, seed=seed).to(device)


def _optimized(device: str, dtype: torch.dtype = torch.float32, name: str = SMALL) -> Any:
    return mk.optimize(create(name).to(device), dtype)


@pytest.mark.parametrize(("device", "name", "dtype"), MODELS, indirect=["device", "dtype"])
def test_every_patched_model_is_as_exact_as_eager(name: str, device: str, dtype: torch.dtype) -> None:
    assert_patched_is_as_exact(create(name).to(device, dtype), images(device).to(dtype))


@pytest.mark.parametrize(("device", "name", "dtype"), MODELS, indirect=["device", "dtype"])
def test_every_optimized_model_is_as_exact_as_eager(name: str, device: str, dtype: torch.dtype) -> None:
    model, x = create(name).to(device), images(device)
    eager, exact = copy.deepcopy(model).to(dtype)(x.to(dtype)), double_of(model)(x.double())
    fast = mk.optimize(model, dtype)
    # the first call records, the second replays only
    for _ in range(2):
        assert_as_exact(fast(x).to(dtype), eager, exact, convolutions(model))


def test_many_images_are_as_exact_as_few(device: str) -> None:
    model, x = create(SMALL).to(device), images(device, 3 if device == "cpu" else 130, 3, 64, 64)
    fast = mk.optimize(model)
    assert_as_exact(fast(x), copy.deepcopy(model)(x), double_of(model)(x.double()), convolutions(model))


def test_a_replay_reads_the_images_that_it_is_given_and_leaves_old_results_alone(device: str) -> None:
    fast = _optimized(device)
    first, second = images(device, seed=1), images(device, seed=2)
    one = fast(first)
    kept = one.clone()
    two = fast(second)
    assert torch.equal(one, kept)
    assert not torch.equal(one, two)
    assert torch.equal(fast(first), one)
    assert fast.graphs == 1


def test_streams_take_turns_and_see_their_own_results(device: str) -> None:
    fast = _optimized(device)
    inputs = [images(device, seed=seed) for seed in range(4)]
    expected = [fast(x) for x in inputs]
    on_device = device == "cuda"
    if on_device:
        torch.cuda.synchronize()
    found = []
    streams = [torch.cuda.Stream() for _ in inputs] if on_device else [None for _ in inputs]
    for _ in range(8):
        for x, stream in zip(inputs, streams, strict=True):
            if stream is None:
                found.append(fast(x))
                continue
            with torch.cuda.stream(stream):
                found.append(fast(x))
                x.record_stream(stream)
    if on_device:
        torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected * 8))


def test_threads_may_make_the_first_call_and_the_thousandth_at_once(device: str) -> None:
    fast = _optimized(device)
    inputs = [images(device, 1 + seed % 2, 3, 64, 64, seed=seed) for seed in range(4)]
    reference = _optimized(device)
    expected = [reference(x) for x in inputs]
    turns = 4 if device == "cpu" else 100

    def call(index: int) -> bool:
        with torch.no_grad():
            good = True
            for _ in range(turns):
                # on whatever stream this thread has; the device as a whole can't be waited for while another records
                y = fast(inputs[index])
                if device == "cuda":
                    torch.cuda.current_stream().synchronize()
                good &= bool(torch.equal(y, expected[index]))
            return good

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(call, range(len(inputs))))
    assert fast.graphs == 2


def test_copies_and_pickles_have_graphs_of_their_own_and_give_the_same(device: str) -> None:
    fast, x = _optimized(device, torch.bfloat16), images(device)
    y = fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.graphs == 0
        assert torch.equal(other(x), y)
        del other
    assert fast.graphs == 1
    assert torch.equal(fast(x), y)


def test_no_more_graphs_than_the_bound_are_kept_and_dropped_ones_come_back_the_same(device: str) -> None:
    fast = _optimized(device)
    first = images(device, 1, 3, 32, 32)
    y = fast(first)
    for size in range(40, 40 + 8 * (gpu.GRAPHS + 1), 8):
        fast(images(device, 1, 3, 32, size))
    assert fast.graphs == gpu.GRAPHS
    assert torch.equal(fast(first), y)


def test_a_network_inside_somebody_elses_graph_is_recorded_there(device: str) -> None:
    fast, x = _optimized(device), images(device)
    expected = fast(x)
    if device == "cpu":
        # what such a call does without a graph of its own
        fast._graphs._recorder.recording_elsewhere = lambda: True
        assert torch.equal(fast(x), expected)
        return
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = fast(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


def test_a_patched_model_under_reduce_overhead_is_as_exact_and_sees_changed_weights(device: str) -> None:
    torch._dynamo.reset()
    model, x = create(SMALL).to(device), images(device)
    eager = copy.deepcopy(model)
    mk.patch(model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    # the third call is the first that replays
    for _ in range(4):
        assert_as_exact(compiled(x).clone(), eager(x), double_of(eager)(x.double()), convolutions(model))
    for net in (model, eager):
        net.blocks[0][0].conv.weight.mul_(1.5)
    assert_as_exact(compiled(x).clone(), eager(x), double_of(eager)(x.double()), convolutions(model))
