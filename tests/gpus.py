"""A GPU that is not there: models take the path for CUDA tensors, on CPU tensors, and CUDA's calls do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnv4_kernels import environment, ops
from mnv4_kernels.backends import cuda
from mnv4_kernels.engine.graphs import Recording, Run
from mnv4_kernels.modules import leaves
from mnv4_kernels.ops._contract import DIRECT, FORMULAS, differentiable_by

#: what a test of a GPU's path is run on: CPU tensors that are taken for a GPU's, and a GPU
DEVICES = [
    "pretended",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are gathered and folded as for a GPU; the ops answer by what serves the CPU."""
    monkeypatch.setattr(leaves, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "reasons", lambda: ())


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and the ops are the Triton kernels; for processes with TRITON_INTERPRET=1."""
    pretend(monkeypatch)
    for op in cuda.KERNELS.keys() & environment.OPS:
        monkeypatch.setattr(ops, op, cuda.kernel(op))
    for op in DIRECT:
        monkeypatch.setitem(DIRECT, op, by_kernels(op))


def by_kernels(op: str) -> Any:
    """A training op as an autograd function of its Triton kernels."""
    return differentiable_by(cuda.kernel(op), cuda.kernel(f"{op}_backward"), FORMULAS[op])


def launched(build: Callable[..., Any], *choices: Any) -> Any:
    """An op by a launcher's `build` with explicit `choices` after the op's own arguments."""

    def op(*arguments: Any) -> Any:
        result, launches = build(*arguments, *choices)
        for launch in launches:
            launch.run()
        return result

    return op


class Tape:
    """Stands in for CUDA graphs: a replay runs the same work anew, into the same tensors, and nothing else."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.inside = 0
        self.fail_with: list[Exception] = []

    def record(self, run: Run, x: torch.Tensor) -> Recording:
        self.events.append("record")
        if self.fail_with:
            raise self.fail_with.pop()
        results = [result.clone() for result in run(x)]

        def replay() -> None:
            assert self.inside == 1, "a replay out of turn"
            self.events.append("replay")
            for old, new in zip(results, run(x), strict=True):
                old.copy_(new)

        for result in results:
            # a recording computes nothing before its first replay
            result.fill_(float("nan"))
        return Recording(x, results, replay)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two calls at a time"
        try:
            yield
        finally:
            self.inside -= 1

    def wait(self) -> None:
        self.events.append("wait")

    def recording_elsewhere(self) -> bool:
        return False


class _Event:
    """A CUDA event: 0.1 ms after the one before."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        assert self.timed
        assert end.timed
        return 0.1


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, _Stream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, _Event)

    def synchronize(self) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda` as far as this project calls it, doing nothing: lines written for a device run without one."""
    stream = _Stream()
    properties = SimpleNamespace(name="A Stand-in", major=9, minor=0, multi_processor_count=132)

    @contextlib.contextmanager
    def within(*_: object, **__: object) -> Iterator[None]:
        yield

    replaced: dict[str, Callable[..., Any]] = {
        "Event": _Event,
        "Stream": lambda *_: _Stream(),
        "CUDAGraph": _Graph,
        "current_stream": lambda *_: stream,
        "stream": within,
        "graph": within,
        "device": within,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: properties.name,
        "is_available": lambda: True,
    }
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
