"""The device that the campaign runs on, and one that is made up, for its control flow."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mnv4_kernels.engine.graphs import Recording, Run
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import tune
from mnv4_kernels.ops.gpu.config import Config

Timing = dict[str, float]


class Gpu:
    """The current CUDA device."""

    device = "cuda"
    #: bytes that are written before each run, so that it finds nothing in L2
    flushed = 256 * 2**20

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name = properties.name
        self.capability = 10 * properties.major + properties.minor
        self.multiprocessors = properties.multi_processor_count
        self._flush: torch.Tensor | None = None

    def alive(self) -> bool:
        """False once an illegal access has made every later call fail."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def free(self) -> None:
        """Gives back what the allocator keeps: rows differ much in size."""
        torch.cuda.empty_cache()

    def time(self, run: Callable[[], object], repeats: int = 50) -> Timing:
        """Median and least microseconds with a cold L2, by events."""
        if self._flush is None:
            self._flush = torch.empty(self.flushed, dtype=torch.int8, device=self.device)
        run()
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000)
        return {"median_us": round(statistics.median(times), 2), "min_us": round(min(times), 2)}

    def together(self, run: Callable[[], object], count: int) -> float:
        """Microseconds of one of `count` runs in a row, with a warm L2."""
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / count

    def replay(self, run: Callable[[], object]) -> Callable[[], None]:
        """The launches of `run` as a graph: what times them without Python."""
        return tune.captured(run)

    def call(self, op: str, arguments: tuple[Any, ...], configs: dict[str, Config] | None = None) -> Any:
        """(result, what launches it, {key: config} of its choices), launched once."""
        result, launches, made = tune.build((op, arguments), configs or {})

        def run() -> None:
            for launch in launches:
                launch.run()

        run()
        return result, run, made

    def compile(self, model: torch.nn.Module, mode: str | None = "max-autotune") -> Any:
        """What ours is compared with."""
        return torch.compile(model, mode=mode)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """The most memory that is allocated while `run` runs, all that is held included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def optimize(self, model: torch.nn.Module, dtype: torch.dtype) -> Any:
        """`mk.optimize`."""
        import mnv4_kernels

        return mnv4_kernels.optimize(model, dtype)


class MadeUp:
    """Nothing is launched: the references answer, and a clock that runs down, so that each try is faster."""

    device = "cpu"
    name = "a made-up device"
    capability = 90
    multiprocessors = 132
    _us = 100.0

    def alive(self) -> bool:
        """Always."""
        return True

    def free(self) -> None:
        """There is nothing to give back."""

    def time(self, run: Callable[[], object], repeats: int = 50) -> Timing:
        """One run, and what the clock says: less each time, until it stands still."""
        run()
        self._us = max(50.0, 0.99 * self._us)
        return {"median_us": round(self._us, 2), "min_us": round(self._us, 2)}

    def together(self, run: Callable[[], object], count: int) -> float:
        """One run."""
        return self.time(run)["median_us"]

    def replay(self, run: Callable[[], object]) -> Callable[[], None]:
        """`run` itself."""
        run()
        return lambda: None

    def call(self, op: str, arguments: tuple[Any, ...], configs: dict[str, Config] | None = None) -> Any:
        """The launches are built and not run."""
        made = tune.build((op, arguments), configs or {})[2]
        result = REFERENCES[op](*arguments)
        return result, lambda: None, made

    def peak_mib(self, run: Callable[[], object]) -> float:
        """One run."""
        run()
        return 0.0

    def compile(self, model: torch.nn.Module, mode: str | None = "max-autotune") -> Any:
        """Traced, and no more."""
        return torch.compile(model, backend="eager")

    def optimize(self, model: torch.nn.Module, dtype: torch.dtype) -> Any:
        """`mk.optimize` of a model that is taken for a GPU's, by the references, replayed by running again."""
        import mnv4_kernels
        from mnv4_kernels.backends import cuda
        from mnv4_kernels.engine import gpu
        from mnv4_kernels.modules import leaves

        # for the rest of the process: blocks ask again at each call
        leaves.on_gpu = lambda tensor: True
        cuda.reasons = lambda: ()
        gpu.GraphedNetwork._recorder = lambda network: _Again()
        return mnv4_kernels.optimize(model, dtype)


class _Again:
    """A recorder whose replay runs the same work anew."""

    def record(self, run: Run, x: torch.Tensor) -> Recording:
        """What `run` gives for x, and again whenever it is replayed."""
        results = run(x)

        def replay() -> None:
            for old, new in zip(results, run(x), strict=True):
                old.copy_(new)

        return Recording(x, results, replay)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """There is one thread."""
        yield

    def wait(self) -> None:
        """Nothing runs."""

    def recording_elsewhere(self) -> bool:
        """Nobody records."""
        return False
