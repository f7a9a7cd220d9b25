"""The gate's plans for every block of the twelve models, the traffic model's arithmetic, and configs as data."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the shapes are read off timm's models")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu_shapes import MODELS, AttentionShape, blocks

from mnv4_kernels import tuned
from mnv4_kernels.ops.gpu import gate, heuristics, traffic
from mnv4_kernels.ops.gpu.config import (
    CONFIGS,
    AttentionConfig,
    DepthwiseConfig,
    DepthwiseGemmConfig,
    GemmConfig,
    PoolConfig,
    PositionsConfig,
    SplitConfig,
    from_json,
    to_json,
)
from mnv4_kernels.ops.gpu.gate import ConvPairShape, UibShape
from mnv4_kernels.ops.gpu.traffic import Ceilings, Cost

BATCHES = (1, 8, 64, 256)


def _uibs(model: str, batch: int) -> list[UibShape]:
    return [block.shape for block in blocks(model, batch) if isinstance(block.shape, UibShape)]


def _floor_bytes(shape: UibShape, element_size: int) -> int:
    """Input and output once: what no plan can go below."""
    out = shape.outputs * shape.out[0] * shape.out[1]
    return element_size * shape.batch * (shape.channels * shape.height * shape.width + out)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_gate_chooses_a_plan_of_every_block_and_gives_reasons_for_the_others(model: str, batch: int) -> None:
    for element_size in (2, 4):
        for shape in _uibs(model, batch):
            plans = gate.uib_plans(shape, element_size)
            decision = gate.uib(shape, element_size)
            assert decision.plan in plans
            assert {plan.name for plan, _ in decision.declined} == {plan.name for plan in plans} - {decision.plan.name}
            assert decision.plan.us <= plans[0].us, "the gate chose a plan that it predicts to be slower than no fusion"
            assert decision.plan.memory >= _floor_bytes(shape, element_size)
            text = decision.explain()
            assert decision.plan.name in text
            assert all(f"not {plan.name}: {reason}" in text for plan, reason in decision.declined)
            one_launch = any(plan.fuse_products for plan in plans)
            assert ("not in one launch: " in text) != one_launch


@pytest.mark.parametrize("batch", BATCHES)
def test_the_gate_decides_on_every_dense_convolution_with_a_product_behind_it(batch: int) -> None:
    pairs = [block.shape for model in MODELS for block in blocks(model, batch)]
    pairs = [shape for shape in pairs if isinstance(shape, ConvPairShape)]
    # each model has at least one EdgeResidual or such a pair of its own
    assert len(pairs) >= len(MODELS)
    for shape in pairs:
        decision = gate.conv_pair(shape)
        unfused = gate.conv_pair_plans(shape)[0]
        assert decision.plan.us <= unfused.us
        assert decision.plan.name in decision.explain()


@pytest.mark.parametrize("batch", BATCHES)
def test_the_gate_decides_on_every_attention_and_declines_what_does_not_fit(batch: int) -> None:
    found = [(block.shape, model) for model in MODELS for block in blocks(model, batch)]
    shapes = [shape for shape, _ in found if isinstance(shape, AttentionShape)]
    assert len(shapes) >= 12
    for shape in shapes:
        keys = -(-shape.height // shape.stride) * -(-shape.width // shape.stride)
        given = gate.AttentionShape(
            batch, shape.channels, shape.channels, shape.height * shape.width, keys, shape.heads, shape.key_depth,
            shape.value_depth, True,
        )  # fmt: skip
        for size in (2, 4):
            plans, decision = gate.attention_plans(given, size), gate.attention(given, size)
            assert decision.plan in plans
            assert decision.plan.us <= plans[0].us
            # in float32 the 144 keys of hybrid_large don't fit beside the outputs either
            fits = shape.channels <= gate.MAX_PROJECTED_OUTPUTS and (size == 2 or keys <= 64)
            assert (len(plans) == 2) == fits
            assert all(f"not {plan.name}: " in decision.explain() for plan in plans if plan != decision.plan)


def test_the_gate_decides_on_a_depthwise_convolution_with_a_product_behind_it() -> None:
    memory_bound = gate.DepthwisePairShape(256, 96, 192, 28, 28, 3)
    assert gate.depthwise_pair(memory_bound).plan.name == "depthwise fused"
    computed_eight_times = gate.DepthwisePairShape(256, 512, 2048, 12, 12, 5)
    assert gate.depthwise_pair(computed_eight_times).plan.name == "unfused"


def test_the_gate_has_a_plan_for_a_batch_of_none() -> None:
    assert gate.uib(UibShape(0, 64, 256, 64, 28, 28, start_kernel=3, mid_kernel=5)).plan.us == 0
    assert gate.conv_pair(ConvPairShape(0, 64, 128, 64, 28, 28, 3)).plan.us == 0
    assert gate.depthwise_pair(gate.DepthwisePairShape(0, 64, 128, 28, 28, 3)).plan.us == 0
    assert gate.attention(gate.AttentionShape(0, 64, 64, 49, 16, 4, 32, 32)).plan.us == 0


def test_a_hidden_tensor_too_wide_for_a_program_leaves_one_plan() -> None:
    (plan,) = gate.conv_pair_plans(ConvPairShape(8, 64, 512, 64, 28, 28, 3))
    assert plan.name == "unfused"


def test_a_block_has_one_plan_for_each_way_to_fuse_its_depthwise_convolutions() -> None:
    both = UibShape(8, 64, 256, 64, 28, 28, start_kernel=3, mid_kernel=5, residual=True)
    fusions = {plan.name.removesuffix(", expanded tensor in L2") for plan in gate.uib_plans(both)}
    assert fusions == {"unfused", "dw_start fused", "dw_mid fused", "dw_start and dw_mid fused"}
    feed_forward = gate.uib_plans(replace(both, start_kernel=0, mid_kernel=0))
    assert {plan.name.removesuffix(", expanded tensor in L2") for plan in feed_forward} == {"unfused", "products fused"}


def test_the_gate_declines_fusion_where_the_depthwise_would_be_computed_many_times() -> None:
    # 2048 output channels are eight column tiles, each of which computes the 5x5 depthwise again
    shape = UibShape(256, 512, 2048, 512, 12, 12, start_kernel=5)
    assert "dw_start" not in gate.uib(shape).plan.name


def test_both_products_are_one_launch_where_a_program_can_hold_the_outputs_of_its_rows() -> None:
    shape = UibShape(256, 160, 640, 160, 16, 16, start_kernel=3, residual=True)
    plan = gate.uib(shape).plan
    assert plan.name == "products fused"
    assert [step.op for step in plan.steps] == ["dwconv_bn_act", "expand_project"]
    assert plan.memory < gate.uib_plans(shape)[0].memory / 2
    wide = replace(shape, outputs=512, residual=False)
    assert not any(plan.fuse_products for plan in gate.uib_plans(wide))


def test_the_gate_fuses_where_the_expanded_tensor_is_all_the_traffic() -> None:
    shape = UibShape(256, 48, 192, 80, 64, 64, mid_kernel=3, mid_stride=2)
    assert "dw_mid fused" in gate.uib(shape).plan.name


def test_a_device_with_slow_arithmetic_makes_the_gate_decline() -> None:
    shape = UibShape(256, 48, 192, 80, 64, 64, mid_kernel=5, mid_stride=2)
    slow = Ceilings(l1_gb_s=3000.0, fma_tflop_s=2.0)
    assert "dw_mid fused" not in gate.uib(shape, 2, slow).plan.name


def test_a_depthwise_moves_its_input_and_output_once() -> None:
    config = DepthwiseConfig(4, 1, rows=7, columns=16, channels=64)
    cost = traffic.depthwise((2, 64, 14, 14), (3, 3), (1, 1), 2, config)
    assert cost.memory == 2 * 2 * (2 * 64 * 14 * 14)
    assert cost.programs == 2 * 2 * 14 // 16 + 1
    # 9 rows of 3 columns feed 7 rows of outputs, each of which is stored once
    assert cost.l1 == 2 * (2 * 64 * 14 * 14) * (9 * 3 / 7 + 1)


def test_a_product_counts_its_padding_and_its_operands_for_each_tile() -> None:
    config = GemmConfig(4, 3, block_m=64, block_n=64, block_k=32)
    cost = traffic.gemm(100, 70, 40, 2, config, residual=True)
    assert cost.matmul == 2 * 128 * 128 * 64
    assert cost.memory == 2 * (100 * 40 + 70 * 40 + 2 * 100 * 70)
    assert cost.l2 == 2 * (2 * 100 * 40 + 2 * 70 * 40 + 2 * 100 * 70)


def test_both_products_of_a_block_read_rows_and_weights_and_no_expanded_tensor() -> None:
    config = GemmConfig(8, 3, block_m=64, block_n=32, block_k=32)
    cost = traffic.expand_project(100, 40, 96, 24, 2, config, residual=True)
    assert cost.memory == 2 * (100 * 40 + 96 * (40 + 24) + 2 * 100 * 24)
    assert cost.matmul == 2 * 128 * 96 * (64 + 32)
    assert cost.programs == 2


def test_a_fused_depthwise_is_computed_once_for_each_column_tile() -> None:
    config = DepthwiseGemmConfig(8, 1, rows=1, columns=16, block_n=64, block_k=32)
    one = traffic.depthwise_gemm((1, 32, 8, 8), 64, (3, 3), (1, 1), 2, config)
    two = traffic.depthwise_gemm((1, 32, 8, 8), 128, (3, 3), (1, 1), 2, config)
    assert two.fma == 2 * one.fma
    assert two.matmul == 2 * one.matmul


def test_time_is_that_of_the_slowest_level_and_grows_where_the_device_idles() -> None:
    ceilings = Ceilings(launch_us=0.0)
    memory_bound = Cost(memory=3e9, l2=3e9, l1=3e9, matmul=0.0, fma=0.0, programs=132 * 8)
    assert memory_bound.us(ceilings) == pytest.approx(1000.0)
    compute_bound = Cost(memory=0.0, l2=0.0, l1=0.0, matmul=790e9, fma=60e9, programs=132)
    assert compute_bound.us(ceilings) == pytest.approx(2000.0)
    assert replace(compute_bound, programs=66).us(ceilings) == pytest.approx(4000.0)


@pytest.mark.parametrize(
    "config",
    [
        DepthwiseConfig(4, 1, 7, 16, 64),
        GemmConfig(8, 3, 128, 256, 64, 4),
        DepthwiseGemmConfig(8, 1, 2, 64, 256, 32),
        AttentionConfig(4, 1, 64, 2, 64),
        PoolConfig(4, 1, 16, 64),
        PositionsConfig(4, 1, 64, 32),
        SplitConfig(4, 1, 64, 32, 32, 8),
    ],
)
def test_every_config_survives_a_file(config: object) -> None:
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_every_kind_of_config_is_tested_above() -> None:
    (mark,) = test_every_config_survives_a_file.pytestmark
    assert {type(config).__name__ for config in mark.args[1]} == set(CONFIGS)


def test_a_config_that_no_kernel_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`kind` must be one of DepthwiseConfig, .*, got 'WarpConfig'"):
        from_json({"kind": "WarpConfig"})
    with pytest.raises(ValueError, match=r"a PoolConfig can't be made of \['rows'\]"):
        from_json({"kind": "PoolConfig", "rows": 1})


PROVENANCE = {
    "device": "A Device 1", "command": "tune", "commit": "abc", "date": "2026-01-01", "torch": "2", "triton": "3",
    "copy_gb_s": 1.0, "matmul_tflop_s": 1.0,
}  # fmt: skip


def test_a_tuned_file_of_ones_own_is_asked_first_and_only_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DepthwiseConfig(4, 1, 7, 16, 64)
    path = tmp_path / "own.json"
    tuned.write(path, PROVENANCE, {"key": (config, 12.3456)})
    assert json.loads(path.read_text())["configs"]["key"]["us"] == 12.346
    monkeypatch.setenv("MNV4_KERNELS_TUNED", str(path))
    assert tuned.lookup("A Device 1", "key") == config
    assert tuned.lookup("A Device 1", "another key") is None
    assert tuned.lookup("Another Device", "key") is None


def test_a_tuned_file_without_provenance_is_an_error(tmp_path: Path) -> None:
    incomplete = {name: value for name, value in PROVENANCE.items() if name != "commit"}
    with pytest.raises(ValueError, match="`provenance` must name commit"):
        tuned.write(tmp_path / "x.json", incomplete, {})
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": 1, "provenance": incomplete, "configs": {}}))
    with pytest.raises(ValueError, match=r"`provenance` of x\.json must name commit"):
        tuned.read(path)
    path.write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match=r"`format` of x\.json must be 1, got 2"):
        tuned.read(path)


def test_every_shipped_tuned_file_can_be_read() -> None:
    for path in Path(tuned.__file__).parent.glob("*.json"):
        provenance, configs = tuned.read(path)
        assert tuned.shipped(provenance["device"]) == path
        assert configs


@pytest.mark.parametrize("channels", [24, 40, 72, 120, 960])
def test_a_channel_block_wastes_less_than_a_third_of_its_lanes(channels: int) -> None:
    block = heuristics.channel_block(channels)
    assert -(-channels // block) * block * 2 < channels * 3


@pytest.mark.parametrize("out", [1, 7, 12, 14, 56, 111])
def test_a_strip_is_never_taller_than_the_map(out: int) -> None:
    config = heuristics.depthwise((256, 64, out, out), (5, 5), (1, 1), 2)
    assert 1 <= config.rows <= out
