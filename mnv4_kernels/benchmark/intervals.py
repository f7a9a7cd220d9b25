"""Medians and intervals that say how sure a comparison is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: What an interval should cover.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the one is as the other: a median over rounds, and an interval for it."""

    value: float
    low: float
    high: float
    #: probability with which the interval covers the true median; below `CONFIDENCE` with fewer than six rounds
    confidence: float

    @property
    def differs(self) -> bool:
        """False if the interval spans 1: then nothing is shown."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.confidence:.0%} interval {self.low:.2f} to {self.high:.2f})"


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """The median of `slower` over `faster`, round by round, with the interval between two order statistics.

    Both were measured in the same rounds, so that what disturbs a round disturbs both. The interval assumes nothing
    about the times but that rounds are independent; resampling as few as seven rounds covers less than it claims.
    """
    if len(slower) != len(faster) or not slower:
        raise ValueError(f"both must have the same rounds, got {len(slower)} and {len(faster)}")
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    left_out, confidence = _order(len(ratios))
    return Ratio(statistics.median(ratios), ratios[left_out], ratios[-1 - left_out], confidence)


def _order(rounds: int) -> tuple[int, float]:
    """How many values to leave out on each side so that what is left covers the median, and how surely."""
    best = (0, _coverage(rounds, 0))
    for left_out in range(1, (rounds + 1) // 2):
        covered = _coverage(rounds, left_out)
        if covered < CONFIDENCE:
            break
        best = (left_out, covered)
    return best


def _coverage(rounds: int, left_out: int) -> float:
    # the median is outside where at most `left_out` of the values fall on one side of it
    return max(0.0, 1 - 2 * sum(math.comb(rounds, k) for k in range(left_out + 1)) / 2**rounds)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / 2 / middle
