"""Times the calls that timm's models make of each op, by every competitor, each after its result was compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from competitors import COMPETITORS, OURS, missing, prepare
from pytest_benchmark.fixture import BenchmarkFixture

from mnv4_kernels.backends import native
from mnv4_kernels.testing import Case

#: Written before each call with cold caches: more than any last level that a core reaches.
EVICTED_BYTES = 256 << 20

#: Calls with cold caches.
COLD_ROUNDS = 30


def evictor() -> Callable[[], None]:
    """What fills every cache, of every thread, with other data."""
    buffer = torch.zeros(EVICTED_BYTES // 4)

    def evict() -> None:
        buffer.add_(1)

    return evict


def test_op(
    case: Case,
    dtype: torch.dtype,
    competitor: str,
    benchmark: BenchmarkFixture,
    medians: dict[tuple[str, str, str], dict[str, float]],
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    if competitor == OURS and not native.available():
        pytest.skip("; ".join(native.reasons()))
    reason = missing(competitor, dtype)
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(options.threads)
    benchmark.group = case.op
    with torch.no_grad():
        call, error = prepare(case, dtype, competitor)
        layout, _ = COMPETITORS[competitor]
        benchmark.extra_info.update(
            error=error, layout=layout, batch=options.batch, threads=options.threads, memory=options.memory
        )
        if options.memory == "cold":
            benchmark.pedantic(call, setup=evictor(), rounds=COLD_ROUNDS, warmup_rounds=2)
        else:
            benchmark(call)
    # nothing was timed with --benchmark-disable
    if benchmark.stats is not None:
        key = (case.op, str(case).removeprefix(f"{case.op}-"), str(dtype).removeprefix("torch."))
        medians[key][competitor] = benchmark.stats.stats.median
