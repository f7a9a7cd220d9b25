"""Tuning without a device: what is recorded, tried, forced and compared."""

from __future__ import annotations

import pytest
import torch

from mnv4_kernels import functional  # noqa: F401
from mnv4_kernels.ops.gpu import select
from mnv4_kernels.ops.gpu.config import (
    AttentionConfig,
    Config,
    DepthwiseConfig,
    DepthwiseGemmConfig,
    GemmConfig,
    PoolConfig,
)
from mnv4_kernels.ops.gpu.tune import agrees, build, candidates, record, tune

FIRST = (
    DepthwiseConfig(4, 1, 7, 16, 64),
    GemmConfig(8, 3, 128, 256, 64),
    DepthwiseGemmConfig(8, 1, 2, 64, 256, 32),
    AttentionConfig(4, 1, 64, 2, 64),
    PoolConfig(4, 1, 16, 64),
)


def _depthwise_call(device: str = "cpu") -> tuple[str, tuple[object, ...]]:
    x = torch.empty(1, 16, 8, 8, device=device).to(memory_format=torch.channels_last)
    weight = torch.empty(16, 1, 3, 3, device=device)
    return "dwconv_bn_act", (x, weight, None, None, [1, 1], [1, 1, 1, 1], [1, 1], "relu")


def test_a_recorder_notes_calls_of_ops_with_kernels_and_their_arguments() -> None:
    op, arguments = _depthwise_call()
    with record() as calls:
        torch.ops.mnv4_kernels.dwconv_bn_act(*arguments)
        torch.relu(arguments[0])
    ((name, noted),) = calls
    assert name == op
    assert noted[0] is arguments[0]
    assert noted[7] == "relu"


@pytest.mark.parametrize("first", FIRST, ids=lambda config: type(config).__name__)
def test_the_heuristics_config_is_tried_first_and_each_candidate_once(first: Config) -> None:
    tried = candidates(first)
    assert tried[0] == first
    assert len(tried) == len(set(tried)) > 10
    assert {type(config) for config in tried} == {type(first)}


def test_a_forced_config_is_used_and_the_choice_is_seen() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    call = _depthwise_call("meta")
    _, (launch,), made = build(call, {})
    ((key, config),) = made.items()
    assert config == launch.config
    other = DepthwiseConfig(8, 1, 3, 32, 16)
    _, (launch,), made = build(call, {key: other})
    assert launch.config == made[key] == other
    assert launch.constants["ROWS"] == 3
    _, (launch,), _ = build(call, {})
    assert launch.config == config, "a forced config outlived its context"


def test_a_forced_config_of_another_kernel_is_not_used() -> None:
    shape, device = (1, 16, 8, 8), torch.device("cpu")
    expected = select.depthwise_config(shape, (3, 3), (1, 1), torch.float32, device)
    key = "dwconv_bn_act/float32/1x16x8x8/k3s1"
    with select.forced({key: PoolConfig(4, 1, 16, 64)}) as made:
        assert select.depthwise_config(shape, (3, 3), (1, 1), torch.float32, device) == expected
    assert made == {key: expected}


def test_a_device_that_is_assumed_changes_the_heuristics_choice_only_within() -> None:
    device = torch.device("cpu")
    before = select.gemm_config("op", 65536, 256, 640, torch.float32, device)
    with select.assume(86):
        consumer = select.gemm_config("op", 65536, 256, 640, torch.float32, device)
    assert consumer.stages * (consumer.block_m + consumer.block_n) * consumer.block_k * 4 <= 99 * 1024
    assert before.stages > consumer.stages
    assert select.gemm_config("op", 65536, 256, 640, torch.float32, device) == before


def test_results_agree_up_to_rounding_and_no_further() -> None:
    x = torch.randn(100, dtype=torch.bfloat16)
    assert agrees(x, x)
    assert agrees((x, x), (x, x))
    wrong = x.clone()
    wrong[7] += x.abs().max()
    assert not agrees(wrong, x)
    assert not agrees((x, wrong), (x, x))
    assert not agrees(torch.full_like(x, float("nan")), x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tuning_without_a_device_is_an_error(tmp_path: object) -> None:
    with pytest.raises(RuntimeError, match="tuning needs a CUDA device"):
        tune([], tmp_path, command="", commit="", ceilings=(1.0, 1.0))
