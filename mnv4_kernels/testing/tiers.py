"""Every instruction-set tier on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..backends import native

#: Every tier that some build has, lowest first; what tests are parametrised over, with the absent ones skipped.
KNOWN_TIERS = ("scalar", "neon", "avx2", "avx512", "avx512bf16", "amx")


def tiers() -> list[str]:
    """Tiers that the C++ library has and this processor can run, lowest first; empty without the library."""
    if not native.available():
        return []
    compiled = native.module().compiled_tiers()
    return list(compiled[: compiled.index(native.module().detected_tier()) + 1])


@contextmanager
def forced_tier(name: str) -> Iterator[None]:
    """The C++ ops use tier `name`, process-wide.

    Raises:
        ValueError: the library or this processor doesn't have that tier.
        RuntimeError: the C++ library is not there.
    """
    library = native.module()
    if name not in tiers():
        raise ValueError(f"`name` must be one of {', '.join(tiers())}, got {name!r}")
    before = library.active_tier()
    library.set_tier_cap(name)
    try:
        yield
    finally:
        if before == library.detected_tier():
            library.clear_tier_cap()
        else:
            library.set_tier_cap(before)
