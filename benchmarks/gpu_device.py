"""The device that the campaign runs on, and one that is made up, for its control flow."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu import tune
from mnv4_kernels.ops.gpu.config import Config

Timing = dict[str, float]


class Gpu:
    """The current CUDA device."""

    device = "cuda"

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
            self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
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
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def call(self, op: str, arguments: tuple[Any, ...], configs: dict[str, Config] | None = None) -> Any:
        """(result, what launches it, {key: config} of its choices), launched once."""
        result, launches, made = tune.build((op, arguments), configs or {})

        def run() -> None:
            for launch in launches:
                launch.run()

        run()
        return result, run, made

    def compile(self, model: torch.nn.Module) -> Any:
        """What ours is compared with."""
        return torch.compile(model, mode="max-autotune")

    def optimize(self, model: torch.nn.Module, dtype: torch.dtype) -> Any:
        """`mk.optimize`."""
        import mnv4_kernels

        return mnv4_kernels.optimize(model, dtype)


class MadeUp:
    """Nothing is launched: the references answer, and a clock that counts calls."""

    device = "cpu"
    name = "a made-up device"
    capability = 90
    multiprocessors = 132

    def alive(self) -> bool:
        """Always."""
        return True

    def free(self) -> None:
        """There is nothing to give back."""

    def time(self, run: Callable[[], object], repeats: int = 50) -> Timing:
        """One run, by the wall clock."""
        begin = time.perf_counter()
        run()
        us = (time.perf_counter() - begin) * 1e6
        return {"median_us": round(us, 2), "min_us": round(us, 2)}

    def together(self, run: Callable[[], object], count: int) -> float:
        """One run, by the wall clock."""
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

    def compile(self, model: torch.nn.Module) -> Any:
        """Traced, and no more."""
        return torch.compile(model, backend="eager")

    def optimize(self, model: torch.nn.Module, dtype: torch.dtype) -> Any:
        """A copy."""
        return copy.deepcopy(model).to(dtype)
