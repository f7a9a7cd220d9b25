"""What the machine can do at most: multiply-adds and bytes per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..backends import native


@dataclass(frozen=True)
class Ceilings:
    """The two limits of a roofline, and how the first was found."""

    gflops: float
    gbytes: float
    source: str


def measure_ceilings(dtype: torch.dtype, threads: int, traffic: int) -> Ceilings:
    """Both ceilings for `threads` threads, about a second of work.

    Args:
        dtype: of the multiply-adds.
        threads: as many as torch uses.
        traffic: bytes that the case moves at least; reading a buffer of that size again and
            again tells the rate at which the case can get them: from the caches if they fit.
    """
    gflops, source = _peak_gflops(dtype, threads)
    return Ceilings(gflops, _read_gbytes(traffic), source)


def _peak_gflops(dtype: torch.dtype, threads: int) -> tuple[float, str]:
    if native.available():
        # float16 is widened to float32 by every kernel: no tier multiplies it
        peak = native.module().peak_gflops(dtype == torch.bfloat16, threads)
        if dtype != torch.bfloat16 and native.module().has_term_products():
            in_terms = native.module().peak_gflops(True, threads) / native.module().term_products
            if in_terms > peak:
                return in_terms, "products of terms in bfloat16 on registers"
        return peak, "multiply-adds on registers"
    # a library's matrix product stays below what the processor can do, so shares read too high
    side = 1536
    a, b = torch.randn((2, side, side)).to(dtype)
    seconds = _best_seconds(lambda: torch.mm(a, b), 8)
    return 2 * side**3 / seconds / 1e9, "torch.mm, an underestimate"


def _read_gbytes(traffic: int) -> float:
    buffer = torch.zeros(traffic // 4)
    return traffic / _best_seconds(buffer.sum, 16) / 1e9


def _best_seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
