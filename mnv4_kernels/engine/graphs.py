"""Replay of a network's launches as CUDA graphs: one for each kind of input, a bounded number of them.

One lock and one event a cache: calls from several threads and streams take turns, in Python and on the
device, because the graphs of a cache share one memory pool and each has one input buffer. Copies of a network have
caches of their own, which is what concurrent streams want.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from ..backends.torch_internals import suggest_memory_format

#: Launches before a capture: Triton compiles at the first, and libraries allocate what they keep.
WARMUP = 2

#: torch allows one capture at a time in a process
_CAPTURING = threading.Lock()

#: what a network computes for an input: its results, in order
Run = Callable[[torch.Tensor], list[torch.Tensor]]


class Recording(NamedTuple):
    """One graph: where its input lies, where its results will, and what replays it."""

    x: torch.Tensor
    results: list[torch.Tensor]
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records and orders launches on one device."""

    def record(self, run: Run, x: torch.Tensor) -> Recording:
        """The launches of `run` on `x`, recorded and not run; `x` is the recording's input from now on."""

    def in_order(self) -> contextlib.AbstractContextManager[None]:
        """Within, what is launched follows what was launched within it before, whatever the stream."""

    def wait(self) -> None:
        """Returns when nothing that was launched `in_order` is running."""

    def recording_elsewhere(self) -> bool:
        """True while somebody else records the current stream."""


class CudaRecorder:
    """CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run, x: torch.Tensor) -> Recording:
        """The launches of `run` on `x` as a graph."""
        caller = torch.cuda.current_stream(self._device)
        # `torch.cuda.graph` leaves its stream current when a capture can't be ended
        with torch.cuda.device(self._device), _CAPTURING, torch.cuda.stream(caller):
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP):
                    run(x)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on allocating
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                results = run(x)
            caller.wait_stream(self._stream)
        return Recording(x, results, graph.replay)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """The current stream waits for the last call's, and the next call's will wait for it."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def wait(self) -> None:
        """Blocks until the last call's launches are done."""
        self._done.synchronize()

    def recording_elsewhere(self) -> bool:
        """True inside somebody's own graph capture."""
        return torch.cuda.is_current_stream_capturing()


class GraphCache:
    """Recordings by kind of input, the least recently used dropped first.

    Args:
        recorder: of the network's device.
        capacity: how many recordings are kept.
    """

    def __init__(self, recorder: Recorder, capacity: int) -> None:
        self._recorder = recorder
        self._capacity = capacity
        self._recordings: OrderedDict[tuple[Any, ...], Recording] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._recordings)

    def call(self, what: Any, run: Run, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """`run` on `x` [N, C, H, W] in `dtype`, by replay; the results are the caller's own.

        Args:
            what: tells `run` from other functions of this cache.
            run: launches the same work for any values of its input, and reads nothing else that changes.
            x: on the recorder's device, at least one element.
            dtype: that `run` takes.
        """
        if self._recorder.recording_elsewhere():
            return run(x.to(dtype))
        key = (what, tuple(x.shape), suggest_memory_format(x))
        with self._lock, self._recorder.in_order():
            recording = self._recordings.get(key)
            if recording is None:
                # inference tensors could not be written to outside of inference mode
                with torch.inference_mode(False), torch.no_grad():
                    recording = self._record(key, run, x, dtype)
            self._recordings.move_to_end(key)
            recording.x.copy_(x)
            recording.replay()
            return [result.clone() for result in recording.results]

    def _record(self, key: tuple[Any, ...], run: Run, x: torch.Tensor, dtype: torch.dtype) -> Recording:
        while len(self._recordings) >= self._capacity:
            # its buffers are given back: not while they are in use
            self._recorder.wait()
            self._recordings.popitem(last=False)
        static = torch.empty_like(x, dtype=dtype, memory_format=key[2])
        # values that the recording's first launches work on: uninitialised ones may be slow or trap
        static.copy_(x)
        recording = None
        try:
            recording = self._recorder.record(run, static)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        # out here, since the error holds what the failed attempt took
        if recording is None:
            self._recorder.wait()
            self._recordings.clear()
            recording = self._recorder.record(run, static)
        self._recordings[key] = recording
        return recording
