"""Shared pieces of the tests that run in Triton's interpreter; `tests/test_triton_interpreter.py` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mnv4_kernels.ops.conv_pwconv import triton_conv_pwconv
from mnv4_kernels.ops.dwconv_pwconv import triton_dwconv_pwconv
from mnv4_kernels.ops.mqa_projected import triton_mqa_projected

ACTS = ("none", "relu", "relu6", "hard_swish", "silu", "gelu", "gelu_tanh")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN: what a kernel forgets to write can't look right."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def nhwc(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random channels_last tensor."""
    return torch.randn(*size).to(dtype).contiguous(memory_format=torch.channels_last)


def assert_earned(
    actual: torch.Tensor, expected64: torch.Tensor, low: torch.Tensor, fake: torch.Tensor, terms: int
) -> None:
    """Error against float64 at most twice eager's in the same dtype, plus one rounding and `terms` float32 ones."""
    assert actual.shape == expected64.shape
    assert actual.dtype == low.dtype
    assert actual.stride() == fake.stride()
    if actual.numel() == 0:
        return
    magnitude = expected64.abs().max().item() + 1.0
    band = torch.finfo(actual.dtype).eps * magnitude + terms * torch.finfo(torch.float32).eps * magnitude
    error = (actual.double() - expected64).abs().max().item()
    eager = (low.double() - expected64).abs().max().item()
    assert error <= 2 * (eager + band), f"error {error:.3g}, eager's {eager:.3g}, band {band:.3g}"


@pytest.fixture(params=[True], ids=["fused"])
def fuse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The gate's answer to every call of a fused op: True, unless a test's `indirect` parameter says otherwise."""
    choice: bool = request.param
    plan = SimpleNamespace(plan=SimpleNamespace(fuse_mid=choice))
    for module in (triton_conv_pwconv, triton_dwconv_pwconv, triton_mqa_projected):
        monkeypatch.setattr(module, "decide", lambda *arguments: plan)
    return choice
