"""Uninitialised memory made visible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backends import native


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every allocation of torch's and of the C++ ops is filled with NaN: what a kernel forgets to write shows.

    Integers of torch's are filled with their largest value. The switches are process-wide.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # filling happens only with deterministic algorithms; warn_only: an op without one must not fail for that
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    # the ops ask the allocator themselves, where torch's switch is not heard
    fill_ours = native.module().fill_fresh_memory if native.available() else lambda on: None
    fill_ours(True)
    try:
        yield
    finally:
        fill_ours(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
