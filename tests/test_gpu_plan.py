"""The plan for a GPU, on CPU tensors: which steps become one op, what stays timm's, and what declines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from gpus import pretend
from models import HYBRID, NAMES, SMALL, assert_patched_is_as_exact, create, images, ops_called
from training_models import assert_trains_alike, smooth

import mnv4_kernels as mk
from mnv4_kernels.backends import cuda
from mnv4_kernels.modules import gpu
from mnv4_kernels.modules.gpu import Group
from mnv4_kernels.ops.piece import piece

AA = "mobilenetv4_conv_aa_medium"


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def _titles(block: Any) -> list[str]:
    return [item.op if isinstance(item, Group) else item.name for item in gpu.gathered(block._mnv4_body(""))]


def _model(name: str = SMALL) -> Any:
    model = create(name)
    mk.patch(model)
    return model


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    "name", [name if name in (SMALL, HYBRID, AA) else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_model_gathered_for_a_gpu_is_as_exact_as_eager(name: str) -> None:
    assert_patched_is_as_exact(create(name), images(2, 3, 64, 64))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_low_precision_is_as_exact_as_eager(name: str) -> None:
    assert_patched_is_as_exact(create(name).bfloat16(), images(2, 3, 64, 64).bfloat16())


@pytest.mark.usefixtures("_gpu")
def test_a_network_runs_the_ops_of_blocks_and_no_others() -> None:
    model = _model(HYBRID)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        called = ops_called(lambda: model(x))
    kinds = [type(block)._mnv4_base.__name__ for stage in model.blocks for block in stage]
    assert called.count("uib") == kinds.count("UniversalInvertedResidual")
    assert called.count("conv_pwconv") == kinds.count("EdgeResidual")
    assert called.count("mqa_projected") == called.count("kv_downsample") == kinds.count("MobileAttention")
    assert called[0] == "conv_bn_act"
    assert called[-1] == "head"


@pytest.mark.usefixtures("_gpu")
def test_a_pool_of_timms_inside_a_block_leaves_the_half_blocks_around_it() -> None:
    model = _model(AA)
    found = {tuple(_titles(block)) for stage in model.blocks for block in stage if hasattr(block, "pw_exp")}
    assert ("dwconv_pwconv", "dw_mid", "dw_mid.aa", "pw_proj") in found
    assert ("uib",) in found


@pytest.mark.usefixtures("_gpu")
def test_unlike_activations_in_a_block_leave_its_half_blocks() -> None:
    model = _model()
    block = next(block for stage in model.blocks for block in stage if _titles(block) == ["uib"])
    block.pw_exp.bn.act = torch.nn.GELU()
    halves = _titles(block)
    assert halves in (["dwconv_pwconv", "dwconv_pwconv"], ["pw_exp", "dwconv_pwconv"])
    x = images(1, block.pw_exp.conv.in_channels, 5, 6)
    eager = mk.unpatch(copy.deepcopy(block))
    with torch.no_grad():
        torch.testing.assert_close(block(x), eager(x))


@pytest.mark.usefixtures("_gpu")
def test_a_changed_parameter_is_seen() -> None:
    model, x = _model(), images(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        model.conv_stem.weight.mul_(2)
        after = model(x)
        eager = mk.unpatch(copy.deepcopy(model))(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("op", ["uib", "conv_pwconv", "mqa_projected"])
def test_the_switch_of_a_fused_op_gives_its_blocks_to_timm(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model(HYBRID), images(1, 3, 64, 64)
    monkeypatch.setenv(f"MNV4_KERNELS_DISABLE_{op.upper()}", "1")
    with torch.no_grad():
        assert op not in ops_called(lambda: model(x))
    reasons = [row.reason for row in mk.explain(model, x).rows]
    assert any(f"MNV4_KERNELS_DISABLE_{op.upper()}=1" in reason for reason in reasons)


def test_a_machine_whose_gpu_is_too_old_gets_timms_path_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    reason = "the CUDA device is older than compute capability 8.0"
    monkeypatch.setattr(cuda, "reasons", lambda: (reason,))
    model, x = _model(), images(1, 3, 64, 64)
    with torch.no_grad():
        assert ops_called(lambda: model(x)) == []
    assert all(reason in row.reason for row in mk.explain(model, x).rows)


@pytest.mark.usefixtures("_gpu")
def test_heads_that_are_too_wide_for_the_kernels_are_named() -> None:
    model = _model(HYBRID)
    block = next(block for stage in model.blocks for block in stage if hasattr(block, "attn"))
    block.attn.key_dim = 256
    assert "keys and values of 256 channels; the Triton kernels take 128" in block._mnv4_plan().obstacle


def test_an_input_elsewhere_than_the_parameters_is_named() -> None:
    model = _model()
    x = torch.empty(1, 3, 64, 64, device="meta")
    (plan, obstacle) = model._mnv4_decide(x, "stem")
    assert plan is None
    assert obstacle == "the input is on meta; the fused ops run on cpu and cuda"


def test_parameters_in_several_places_keep_timms_path() -> None:
    model = _model()
    block = model.blocks[0][0]
    block.bn1.weight = torch.nn.Parameter(block.bn1.weight.to("meta"))
    assert "on meta" in block._mnv4_plan().obstacle


def test_graphs_of_the_compiler_replay_no_piece() -> None:
    # a replayed piece would not see that a parameter changed
    assert torch.Tag.cudagraph_unsafe in piece.tags


@pytest.mark.usefixtures("_gpu", "one_thread")
@pytest.mark.parametrize("name", [SMALL, pytest.param(HYBRID, marks=pytest.mark.slow)])
def test_a_model_trains_by_the_training_ops(name: str) -> None:
    assert_trains_alike(smooth(name))


@pytest.mark.usefixtures("_gpu", "one_thread")
def test_explain_names_the_training_ops_of_a_block() -> None:
    model = smooth(HYBRID)
    mk.patch(model)
    rows = mk.explain(model, images(2, 3, 64, 64)).rows
    by_class = {row.cls: row for row in rows if row.kernel == "Triton"}
    assert by_class["UniversalInvertedResidual"].steps[-1] == "bn_act"
    assert "dw_start: bn_act_dwconv" in by_class["UniversalInvertedResidual"].steps
    assert any(step.endswith("mqa") for step in by_class["MobileAttention"].steps)
    assert by_class["EdgeResidual"].steps[0].endswith("bn_act_conv")


def test_training_on_a_gpu_that_is_too_old_takes_timms_path_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    reason = "the CUDA device is older than compute capability 8.0"
    monkeypatch.setattr(cuda, "reasons", lambda: (reason,))
    model, x = smooth(), images(2, 3, 64, 64)
    mk.patch(model)
    assert ops_called(lambda: model(x)) == []
    assert any(reason in row.reason for row in mk.explain(model, x).rows)


@pytest.mark.usefixtures("_gpu")
def test_heads_that_are_too_wide_do_not_train_by_the_ops() -> None:
    model = smooth(HYBRID)
    mk.patch(model)
    block = next(block for stage in model.blocks for block in stage if hasattr(block, "attn"))
    block.attn.key_dim = 256
    assert "keys and values of 256 channels; the Triton kernels take 128" in block._mnv4_training_plan().obstacle


def test_training_with_an_input_elsewhere_than_the_parameters_is_named() -> None:
    model = smooth()
    mk.patch(model)
    x = torch.empty(2, 3, 64, 64)
    plan = model.blocks[0][0]._mnv4_training_plan()
    plan.device = torch.device("cuda", 1)
    assert plan.obstacle_of(x.dtype, x.device) == "the input is on cpu, the parameters are on cuda:1"
