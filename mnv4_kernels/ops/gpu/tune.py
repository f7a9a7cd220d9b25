"""Tuning, by explicit call only: times the candidates of each launch on this device and writes the winners.

    with record() as calls:
        model(x)                # any model that calls the ops: patched, optimized, or one's own
    tune(calls, Path("own.json"), command="...", commit="...", ceilings=(copy_gb_s, matmul_tflop_s))

`MNV4_KERNELS_TUNED=own.json` then uses them.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ... import tuned
from ...backends.cuda import KERNELS
from ...backends.torch_internals import TorchDispatchMode
from .config import (
    AttentionConfig,
    Config,
    DepthwiseConfig,
    DepthwiseGemmConfig,
    GemmConfig,
    PoolConfig,
    PositionsConfig,
    SplitConfig,
)
from .launch import Launch
from .select import forced

Call = tuple[str, tuple[Any, ...]]


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "mnv4_kernels" and name in KERNELS:
            self.calls.append((name, tuple(args)))
        return func(*args, **(kwargs or {}))


@contextmanager
def record() -> Iterator[list[Call]]:
    """Within, every call of an op that has a Triton kernel is noted, with its arguments."""
    calls: list[Call] = []
    with _Recorder(calls):
        yield calls


def candidates(config: Config) -> list[Config]:
    """What is tried in place of a heuristic's config, that one first."""
    found: Iterable[Config]
    if isinstance(config, DepthwiseConfig):
        tiles = product((1, 2, 4, 6, 7, 8), (8, 16, 32, 64), (16, 32, 64, 128), (4, 8))
        found = (
            DepthwiseConfig(warps, 1, rows, columns, channels)
            for rows, columns, channels, warps in tiles
            # four to sixteen elements a lane: less wastes loads, more spills
            if 4 <= columns * channels // (32 * warps) <= 16
        )
    elif isinstance(config, GemmConfig):
        blocks = (
            (16, 16, 4), (16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4),
            (128, 64, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8),
        )  # fmt: skip
        found = (
            GemmConfig(warps, stages, block_m, block_n, block_k, config.group_m)
            for (block_m, block_n, warps), block_k, stages in product(blocks, (16, 32, 64, 128), (2, 3, 4))
        )
    elif isinstance(config, DepthwiseGemmConfig):
        shapes = product((1, 2, 4), (16, 32, 64, 128), (16, 32, 64, 128, 256), (16, 32, 64))
        found = (
            DepthwiseGemmConfig(8 if block_n >= 128 else 4, 1, rows, columns, block_n, block_k)
            for rows, columns, block_n, block_k in shapes
            if rows * columns * block_n <= 128 * 256
        )
    elif isinstance(config, AttentionConfig):
        blocks_of_keys = product((16, 32, 64, 128), (1, 2, 4, 8), (16, 32, 64, 128, 256))
        found = (
            AttentionConfig(warps, 1, queries, count, keys)
            for (queries, count, keys), warps in product(blocks_of_keys, (4, 8))
            if queries * keys <= 64 * 256
        )
    elif isinstance(config, PositionsConfig):
        blocks_of_positions = product((16, 32, 64, 128, 256), (16, 32, 64), (4, 8))
        found = (
            PositionsConfig(warps, 1, positions, channels)
            for positions, channels, warps in blocks_of_positions
            if 4 <= positions * channels // (32 * warps) <= 32
        )
    elif isinstance(config, SplitConfig):
        blocks_of_weight = product((32, 64), (64, 128), (32, 64, 128), (1, 2, 4))
        found = (
            SplitConfig(8 if block_n * block_k >= 128 * 128 else 4, 2, block_m, block_n, block_k, parts)
            for block_m, block_n, block_k, factor in blocks_of_weight
            for parts in {max(1, config.parts // factor), config.parts * factor}
        )
    else:
        found = (PoolConfig(4, 1, positions, channels) for positions, channels in product((4, 8, 16, 32), (16, 32, 64)))
    return [config, *(other for other in found if other != config)]


#: fields of a config that are halved and doubled, and the least and the most that they may be
_STEPS = {
    "warps": (2, 16),
    "rows": (1, 8),
    "columns": (4, 256),
    "channels": (16, 128),
    "block_m": (16, 256),
    "block_n": (16, 256),
    "block_k": (16, 128),
    "queries": (16, 128),
    "tiles": (1, 16),
    "keys": (16, 512),
    "positions": (2, 64),
    "parts": (1, 1024),
}


def neighbours(config: Config) -> list[Config]:
    """The configs that differ in one field by one step: half, twice, one stage more or less."""
    found = []
    for name, value in asdict(config).items():
        if name in _STEPS:
            least, most = _STEPS[name]
            values = [step for step in (value // 2, value * 2) if least <= step <= most]
        elif name == "stages" and isinstance(config, GemmConfig):
            values = [step for step in (value - 1, value + 1) if 1 <= step <= 5]
        else:
            values = []
        found += [replace(config, **{name: step}) for step in values]
    return found


def note(path: Path, key: str, config: Config, us: float, provenance: dict[str, Any]) -> None:
    """Adds one winner to a tuned file."""
    found = {key: (config, us) for key, config, us in tuned.rows(path)} if path.is_file() else {}
    tuned.write(path, provenance, {**found, key: (config, us)})


def build(call: Call, configs: dict[str, Config]) -> tuple[Any, list[Launch], dict[str, Config]]:
    """(result, launches, {key: config} of the choices) of a call under these configs; launches nothing."""
    op, arguments = call
    module = importlib.import_module(f"mnv4_kernels.ops.{KERNELS[op]}")
    with forced(configs) as made:
        result, launches = module.build(*arguments)
    return result, launches, made


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """What `run` launches as a CUDA graph's replay, after running it once: several launches take Python longer
    than the device, which would make all configs equally fast."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def median_us(run: Callable[[], object], flush: torch.Tensor, repeats: int = 20) -> float:
    """Median microseconds of `run` with a cold L2, by CUDA events."""
    run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """(copy GB/s, bfloat16 matrix product TFLOP/s) of this device, beside which a tuned file's times are read."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_us(lambda: target.copy_(source), flush) / 1e3
    side = 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = 2 * side**3 / median_us(lambda: a @ b, flush) / 1e6
    return round(copied, 1), round(multiplied, 1)


def best(call: Call, key: str, first: Config, flush: torch.Tensor) -> tuple[Config, float, list[str]]:
    """(fastest config, its microseconds, configs that failed or disagreed with the heuristic's result)."""
    expected, launches, _ = build(call, {key: first})
    _run(launches)
    winner: tuple[Config, float] | None = None
    failures = []
    for config in candidates(first):
        result, launches, _ = build(call, {key: config})
        try:
            us = median_us(captured(partial(_run, launches)), flush)
        # a tile that needs more than the device has; Triton's own class is not importable without Triton
        except Exception as error:
            if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            failures.append(f"{key} {config}: {error}")
            continue
        if not agrees(result, expected):
            failures.append(f"{key} {config}: another result than {first}")
            continue
        if winner is None or us < winner[1]:
            winner = (config, us)
    if winner is None:
        raise RuntimeError(f"no config of {key} runs: {failures[0]}")
    return (*winner, failures)


def agrees(result: Any, expected: Any) -> bool:
    """True where both results differ by no more than the order of float32 sums explains, after rounding."""
    pairs = zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    for found, wanted in pairs:
        scale = wanted.abs().max().float() + 1e-6
        if not bool((found - wanted).abs().max().float() <= 4 * torch.finfo(found.dtype).eps * scale + 1e-5 * scale):
            return False
    return True


def tune(
    calls: Iterable[Call],
    path: Path,
    *,
    command: str,
    commit: str,
    ceilings: tuple[float, float],
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Times every choice of the calls once, on their device, and writes `path`; returns what failed.

    Args:
        calls: what `record` noted.
        path: the tuned file; configs that it already has are kept, so that a run can resume.
        command: how this run was started, for the provenance.
        commit: of the checkout, for the provenance.
        ceilings: (copy GB/s, matrix product TFLOP/s) of the device, measured in the same run.
        stop: asked before each choice; True ends the run early, with what was found.

    Raises:
        RuntimeError: without a CUDA device, or inside a graph capture.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs a CUDA device")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning can't run inside a CUDA graph capture")
    import triton

    provenance = {
        "device": torch.cuda.get_device_name(),
        "command": command,
        "commit": commit,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_s": ceilings[0],
        "matmul_tflop_s": ceilings[1],
    }
    found: dict[str, tuple[Config, float]] = {}
    if path.is_file():
        found = {key: (config, us) for key, config, us in tuned.rows(path)}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    failures: list[str] = []
    for call in calls:
        for key, first in build(call, {})[2].items():
            if key in found or stop():
                continue
            config, us, failed = best(call, key, first, flush)
            found[key] = (config, us)
            failures += failed
            tuned.write(path, provenance, found)
    return failures
