"""A GPU that is not there: models take the path for CUDA tensors, on CPU tensors."""

from __future__ import annotations

import pytest

from mnv4_kernels import ops
from mnv4_kernels.backends import cuda
from mnv4_kernels.modules import leaves


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are gathered and folded as for a GPU; the ops answer by what serves the CPU."""
    monkeypatch.setattr(leaves, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "reasons", lambda: ())


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and the ops are the Triton kernels; for processes with TRITON_INTERPRET=1."""
    pretend(monkeypatch)
    for op in cuda.KERNELS:
        monkeypatch.setattr(ops, op, cuda.kernel(op))
