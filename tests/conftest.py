"""Each test starts from the same random state and leaves the thread count as it was; workers share the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """What compares times has the machine to itself."""
    return 0 if config.option.markexpr == "speed" else None


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
