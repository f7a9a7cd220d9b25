"""Input factories, float64 oracles and earned tolerances; shipped, because other people's ops can use them."""

from .budget import assert_within_budget, error_budget
from .cases import CASES, Case
from .fused import FUSED
from .layouts import LAYOUTS, lay_out
from .oracle import baseline, exact, outputs
from .poison import poisoned_memory
from .tiers import KNOWN_TIERS, forced_tier, tiers

__all__ = [
    "CASES",
    "FUSED",
    "KNOWN_TIERS",
    "LAYOUTS",
    "Case",
    "assert_within_budget",
    "baseline",
    "error_budget",
    "exact",
    "forced_tier",
    "lay_out",
    "outputs",
    "poisoned_memory",
    "tiers",
]
