"""Each test starts from the same random state and leaves the thread count as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """Small maps aren't worth a second thread, least of all on a busy machine."""
    torch.set_num_threads(1)
