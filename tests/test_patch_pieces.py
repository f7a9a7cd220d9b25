"""What no op can stand in for keeps timm's module, with its reason; the rest of the block is still fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    HYBRID,
    NAMES,
    SMALL,
    assert_as_exact,
    assert_same_strides,
    convolutions,
    create,
    double_of,
    images,
    ops_called,
    randomize_,
)
from torch import nn

import mnv4_kernels as mk
from mnv4_kernels import tables
from mnv4_kernels.backends import native
from mnv4_kernels.modules import DropIn

timm = pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:mnv4_kernels.patch")]

layers = pytest.importorskip("timm.layers")
blocks = pytest.importorskip("timm.models._efficientnet_blocks")


def ready(block: nn.Module) -> nn.Module:
    """`block` in eval mode with values that show errors."""
    channels = next(module.in_channels for module in block.modules() if isinstance(module, nn.Conv2d))
    return randomize_(block, channels=channels).eval()


def maps(channels: int, size: int = 10) -> torch.Tensor:
    """[2, channels, size, size], as inside a patched network."""
    return images(2, channels, size, size).contiguous(memory_format=torch.channels_last)


def assert_block_is_as_exact(block: nn.Module, x: torch.Tensor) -> tuple[Any, list[str]]:
    """Patches one block; returns the report and the ops that ran."""
    with torch.no_grad():
        eager, exact = block(x), double_of(block)(x.double())
        report = mk.patch(block)
        actual = block(x)
        called = ops_called(lambda: block(x))
    assert_as_exact(actual, eager, exact, roundings=convolutions(block))
    return report, called


def uib(**options: Any) -> nn.Module:
    """A universal inverted bottleneck, 32 channels in."""
    options = {"out_chs": 32, "exp_ratio": 2.0, **options}
    return ready(blocks.UniversalInvertedResidual(32, **options))


def attention(**options: Any) -> nn.Module:
    """A mobile attention block of 64 channels."""
    options = {"out_chs": 64, "num_heads": 2, "key_dim": 32, "value_dim": 32, "use_multi_query": True, **options}
    return ready(blocks.MobileAttention(64, **options))


SHAPES = {
    "ExtraDW": {"dw_kernel_size_start": 5, "dw_kernel_size_mid": 3},
    "ExtraDW down": {"dw_kernel_size_start": 5, "dw_kernel_size_mid": 5, "stride": 2},
    "IB": {"dw_kernel_size_mid": 3},
    "IB down": {"dw_kernel_size_mid": 3, "stride": 2, "out_chs": 48},
    "ConvNeXt-like": {"dw_kernel_size_start": 7, "dw_kernel_size_mid": 0},
    "ConvNeXt-like down": {"dw_kernel_size_start": 5, "dw_kernel_size_mid": 0, "stride": 2},
    "FFN": {"dw_kernel_size_mid": 0},
    "dw_end": {"dw_kernel_size_mid": 3, "dw_kernel_size_end": 3},
    "dw_end down": {"dw_kernel_size_mid": 0, "dw_kernel_size_end": 5, "stride": 2},
    "dilated": {"dw_kernel_size_start": 3, "dw_kernel_size_mid": 3, "dilation": 2},
    "same": {"dw_kernel_size_start": 5, "dw_kernel_size_mid": 3, "stride": 2, "pad_type": "same"},
    "no skip": {"dw_kernel_size_mid": 3, "noskip": True},
    "no layer scale": {"dw_kernel_size_mid": 3, "layer_scale_init_value": None},
    "drop path": {"dw_kernel_size_mid": 3, "drop_path_rate": 0.5},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [10, 7])
def test_every_shape_of_the_inverted_bottleneck_is_fused(shape: str, size: int) -> None:
    block = uib(**SHAPES[shape])
    report, called = assert_block_is_as_exact(block, maps(32, size))
    assert not report.partly
    assert not report.left_alone
    assert len(called) == convolutions(block)


ATTENTIONS = {
    "plain": {},
    "down": {"kv_stride": 2},
    "down 5x5": {"kv_stride": 2, "dw_kernel_size": 5},
    "down same": {"kv_stride": 2, "pad_type": "same"},
    "down dilated": {"kv_stride": 2, "dilation": 2},
    "wider": {"out_chs": 96},
    "other value size": {"value_dim": 48},
    "no layer scale": {"layer_scale_init_value": None},
    "no skip": {"noskip": True, "kv_stride": 2},
    "dropouts": {"attn_drop": 0.4, "proj_drop": 0.3, "drop_path_rate": 0.2},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("size", [8, 7])
def test_every_kind_of_mobile_attention_is_fused(kind: str, size: int) -> None:
    report, called = assert_block_is_as_exact(attention(**ATTENTIONS[kind]), maps(64, size))
    assert not report.partly
    assert not report.left_alone
    assert called == ["pwconv_bn_act", "kv_downsample", "mqa", "pwconv_bn_act"] or called == [
        "kv_downsample",
        "pwconv_bn_act",
        "mqa",
        "pwconv_bn_act",
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_attention_scales_as_timms_chosen_path_does(fused: bool) -> None:
    block = attention(kv_stride=2)
    block.attn.fused_attn = fused
    block.attn.scale *= 1.5
    assert_block_is_as_exact(block, maps(64))


def test_attention_with_biases_of_query_and_output_is_fused() -> None:
    block = ready(layers.MultiQueryAttention2d(64, num_heads=2, key_dim=32, value_dim=32))
    block.query.proj.bias = nn.Parameter(torch.randn(64))
    block.output.proj.bias = nn.Parameter(torch.randn(64))
    report, called = assert_block_is_as_exact(block, maps(64))
    assert report.replaced
    assert "mqa" in called


def test_a_norm_without_affine_parameters_is_folded() -> None:
    block = uib(dw_kernel_size_mid=3, norm_layer=partial(layers.BatchNormAct2d, affine=False))
    report, called = assert_block_is_as_exact(block, maps(32))
    assert not report.partly
    assert len(called) == convolutions(block)


def test_a_convolution_with_bias_is_folded() -> None:
    block = ready(layers.ConvNormAct(32, 48, 3, bias=True, stride=2))
    nn.init.normal_(block.conv.bias)
    report, called = assert_block_is_as_exact(block, maps(32))
    assert (len(report.replaced), called) == (1, ["conv_bn_act"])


def test_a_convolution_without_norm_is_fused() -> None:
    report, called = assert_block_is_as_exact(
        ready(layers.ConvNormAct(32, 48, 1, apply_norm=False, bias=True)), maps(32)
    )
    assert (len(report.replaced), called) == (1, ["pwconv_bn_act"])


class OwnBatchNorm(nn.BatchNorm2d):
    """A user's: it might compute anything."""


class OwnAct(nn.Module):
    """An activation that no op knows."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


PARTIAL: dict[str, tuple[Callable[[], nn.Module], int, str, set[str]]] = {
    "squeeze-excite": (
        lambda: uib(dw_kernel_size_start=3, dw_kernel_size_mid=3, se_layer=blocks.SqueezeExcite),
        32,
        "squeeze-and-excitation",
        {"dwconv_bn_act", "pwconv_bn_act"},
    ),
    "squeeze-excite in EdgeResidual": (
        lambda: ready(blocks.EdgeResidual(32, 32, exp_ratio=2.0, se_layer=blocks.SqueezeExcite)),
        32,
        "squeeze-and-excitation",
        {"conv_bn_act", "pwconv_bn_act"},
    ),
    "group_size": (
        lambda: uib(dw_kernel_size_mid=3, group_size=8),
        32,
        "grouped convolution (8 groups of 8 channels)",
        {"pwconv_bn_act"},
    ),
    "group_size with an activation that may not be applied twice": (
        lambda: uib(dw_kernel_size_mid=3, group_size=8, act_layer=nn.SiLU),
        32,
        "grouped convolution (8 groups of 8 channels)",
        {"pwconv_bn_act"},
    ),
    "average pool": (
        lambda: uib(dw_kernel_size_mid=3, stride=2, aa_layer="avg"),
        32,
        "anti-aliasing pool",
        {"dwconv_bn_act", "pwconv_bn_act"},
    ),
    "blur pool": (
        lambda: ready(blocks.EdgeResidual(32, 48, exp_ratio=2.0, stride=2, aa_layer="blurpc")),
        32,
        "anti-aliasing pool",
        {"conv_bn_act", "pwconv_bn_act"},
    ),
    "blur pool after a cn block": (
        lambda: ready(blocks.ConvBnAct(32, 48, 3, stride=2, aa_layer="blur")),
        32,
        "anti-aliasing pool",
        {"conv_bn_act"},
    ),
    "attention with position encoding": (lambda: attention(use_cpe=True), 64, "position encoding", {"mqa"}),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_a_piece_that_no_op_knows_stays_timms_and_the_others_are_fused(case: str) -> None:
    build, channels, reason, ops = PARTIAL[case]
    report, called = assert_block_is_as_exact(build(), maps(channels))
    assert any(reason in row.reason for row in (*report.partly, *report.left_alone)), str(report)
    assert ops <= set(called)


LEFT: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "group norm": (
        lambda: uib(dw_kernel_size_mid=3, norm_layer=partial(layers.GroupNormAct, num_groups=4)),
        32,
        "GroupNormAct is not BatchNorm2d",
    ),
    "a user's norm": (
        lambda: _with_norm(uib(dw_kernel_size_mid=3), OwnBatchNorm),
        32,
        "OwnBatchNorm is not BatchNorm2d",
    ),
    "no running statistics": (
        lambda: uib(dw_kernel_size_mid=3, norm_layer=partial(layers.BatchNormAct2d, track_running_stats=False)),
        32,
        "keeps no running statistics",
    ),
    "dropout in the norm": (
        lambda: ready(layers.ConvNormAct(32, 32, 1, drop_layer=partial(nn.Dropout, 0.1))),
        32,
        "Dropout inside BatchNormAct2d",
    ),
    "an unknown activation": (
        lambda: ready(layers.ConvNormAct(32, 32, 1, act_layer=OwnAct)),
        32,
        "activation OwnAct is not one of the ops'",
    ),
    "a mixed convolution": (
        lambda: _with_convolution(layers.ConvNormAct(32, 32, 3), layers.MixedConv2d(32, 32, [3, 5])),
        32,
        "MixedConv2d is no Conv2d that the ops know",
    ),
    "reflecting padding": (
        lambda: _with_convolution(
            layers.ConvNormAct(32, 32, 3), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect", bias=False)
        ),
        32,
        "padding mode reflect",
    ),
    "full attention": (
        lambda: ready(blocks.MobileAttention(64, 64, num_heads=2, use_multi_query=False)),
        64,
        "Attention2d is no multi-query attention",
    ),
    "query strides": (
        lambda: ready(layers.MultiQueryAttention2d(64, num_heads=2, key_dim=32, value_dim=32, query_strides=2)),
        64,
        "query strides (2, 2)",
    ),
    "biases of key and value": (
        lambda: ready(layers.MultiQueryAttention2d(64, num_heads=2, key_dim=32, value_dim=32, use_bias=True)),
        64,
        "`key.proj` has a bias",
    ),
}


def _with_norm(block: nn.Module, cls: type[nn.BatchNorm2d]) -> nn.Module:
    for module in block.modules():
        if isinstance(module, layers.ConvNormAct):
            norm = cls(module.conv.out_channels)
            norm.load_state_dict(module.bn.state_dict())
            module.bn = norm.eval()
    return block


def _with_convolution(block: nn.Module, conv: nn.Module) -> nn.Module:
    block.conv = conv
    return randomize_(block, channels=32).eval()


@pytest.mark.parametrize("case", LEFT)
def test_a_block_without_a_piece_for_an_op_is_left_alone_to_the_bit(case: str) -> None:
    build, channels, reason = LEFT[case]
    block, x = build(), maps(channels, 8)
    with torch.no_grad():
        expected = block(x)
        report = mk.patch(block)
        assert any(reason in row.reason for row in report.left_alone), str(report)
        assert torch.equal(block(x), expected)


def test_synchronised_norms_are_left_alone() -> None:
    model = layers.convert_sync_batchnorm(create(SMALL))
    with torch.no_grad():
        expected = model(images())
        report = mk.patch(model)
        assert any("the statistics of SyncBatchNormAct are of all processes" in row.reason for row in report.left_alone)
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def test_norms_synchronised_after_patching_are_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        expected = model(images())
        converted = layers.convert_sync_batchnorm(model)
        torch.testing.assert_close(converted(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_subclass_of_a_block_is_left_alone() -> None:
    class Louder(layers.ConvNormAct):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = create(SMALL)
    model.blocks[2][1].pw_exp.__class__ = Louder
    with torch.no_grad():
        eager, exact = model(images()), double_of(model)(images().double())
        report = mk.patch(model)
        actual = model(images())
    assert any("Louder is no ConvNormAct" in row.reason for row in report.partly)
    assert_as_exact(actual, eager, exact, roundings=convolutions(model))


def test_methods_replaced_on_the_network_are_respected() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        expected = model(images())
        features = model.forward_features
        model.forward_features = lambda x: features(x) * 0
        assert not torch.allclose(model(images()), expected)


@pytest.mark.parametrize("where", ["", "blocks.2.1", "blocks.2.1.pw_exp", "blocks.2.1.pw_exp.conv", "conv_head"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_on_an_instance_is_respected(where: str, when: str) -> None:
    model = create(SMALL)
    target = model.get_submodule(where)
    if when == "after":
        mk.patch(model)
        with torch.no_grad():
            model(images())
    own = target.forward
    target.forward = lambda x: own(x) * 0
    if when == "before":
        mk.patch(model)
    with torch.no_grad():
        found = model(images())
        target.forward = lambda x: own(x)
        assert not torch.allclose(model(images()), found)


def test_a_mask_goes_down_timms_path() -> None:
    block = attention(kv_stride=1).attn
    x, mask = maps(64, 6), torch.randn(1, 1, 36, 36)
    with torch.no_grad():
        expected = block(x, mask)
        assert not torch.allclose(block(x), expected)
        mk.patch(block)
        assert "mqa" not in ops_called(lambda: block(x, mask))
        assert torch.equal(block(x, mask), expected)
        assert torch.equal(block(x, attn_mask=mask), expected)
        assert "mqa" in ops_called(lambda: block(x))


def test_attention_in_train_mode_drops_as_timm_does() -> None:
    block = attention(attn_drop=0.3, proj_drop=0.2).train()
    x = maps(64, 6)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = block(x)
        mk.patch(block)
        torch.manual_seed(1)
        assert not ops_called(lambda: block(x))
        torch.manual_seed(1)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "tf_efficientnetv2_b0", "lcnet_035"])
def test_other_networks_of_the_same_blocks_are_not_corrupted(name: str) -> None:
    model = create(name)
    with torch.no_grad():
        eager, exact = model(images()), double_of(model)(images().double())
        mk.patch(model)
        actual = model(images())
        mk.unpatch(model)
        assert torch.equal(model(images()), eager)
    assert_as_exact(actual, eager, exact, roundings=convolutions(model))


def test_mobilenet_v5_is_not_corrupted() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv5_base", num_classes=3).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected, exact = model(x), double_of(model)(x.double())
        report = mk.patch(model)
        actual = model(x)
    assert any("RmsNormAct2d is not BatchNorm2d" in row.reason for row in report.left_alone)
    assert_as_exact(actual, expected, exact, roundings=convolutions(model))
    assert_same_strides(actual, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"features_only": True}], ids=["classifier", "features"])
def test_every_leaf_of_every_model_is_accounted_for(name: str, options: dict[str, Any]) -> None:
    model = timm.create_model(name, **options).eval()
    report = mk.patch(model)
    listed = {row.name for row in report.left_alone}
    covered: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, DropIn):
            for piece in ("stem", "head", ""):
                covered.update(_stood_in_for(module, piece))
    for leaf, module in model.named_modules():
        if not list(module.children()):
            assert (module in covered) != (leaf in listed), leaf


def _stood_in_for(module: Any, piece: str) -> list[nn.Module]:
    network = "MobileNetV3" in type(module).__name__
    if network != bool(piece):
        return []
    return list(module._mnv4_body(piece).bypassed)


def test_the_report_is_a_table_with_reasons() -> None:
    text = str(mk.patch(create("mobilenetv4_conv_blur_medium")))
    assert "BlurPool2d" in text
    assert "anti-aliasing pool: no op computes it" in text
    assert "partly" in text


def test_the_tables_stay_within_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = create(HYBRID)
    for text in (str(mk.patch(model)), str(mk.verify(model, images())), str(mk.explain(model, images()))):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        assert set(lines[2]) == {"-"}
        assert any(line.startswith("blocks.2.1") for line in lines)


def test_a_table_puts_below_a_row_what_does_not_fit_beside_it() -> None:
    columns, rows = ("runtime", "ms", "why"), [("eager", "10.25", "a long reason, in words"), ("ours", "3.5", "")]
    assert tables.render("title", columns, rows, ("a note",), width=80).splitlines() == [
        "title",
        "runtime     ms  why",
        "---------------------------------------",
        "eager    10.25  a long reason, in words",
        "ours       3.5",
        "a note",
    ]
    assert tables.render("", columns, rows, width=20).splitlines() == [
        "runtime     ms",
        "--------------",
        "eager    10.25",
        "    a long reason,",
        "    in words",
        "ours       3.5",
    ]


def test_explain_says_which_op_each_block_runs_or_that_it_is_not_patched() -> None:
    model = create(HYBRID)
    assert {row.reason for row in mk.explain(model, images()).rows} == {"not patched"}
    mk.patch(model)
    rows = {row.name: row for row in mk.explain(model, images()).rows}
    assert rows["stem"].steps == ("stem: conv_bn_act",)
    assert rows["stem"].shape == (2, 3, 64, 64)
    assert rows["head"].steps == ("head: head",)
    assert rows["blocks.0.0"].cls == "EdgeResidual"
    assert "attention: mqa" in rows["blocks.2.4"].steps
    assert not any(row.reason for row in rows.values() if "C++" in row.kernel)


def test_explain_says_whether_a_network_is_one_program_or_why_not() -> None:
    def row(model: Any) -> Any:
        (found,) = (row for row in mk.explain(model, images()).rows if row.name == "(model)")
        return found

    model = create(SMALL)
    mk.patch(model)
    assert row(model).steps == ("block by block",)
    assert "gradients are enabled" in row(model).reason
    with torch.no_grad():
        if native.available():
            assert row(model).steps == ("one program of the engine",)
            assert "C++" in row(model).kernel
        model.blocks[2][1].dw_mid.register_forward_hook(lambda *_: None)
        assert row(model).reason == "a forward hook on an inner module, or a global one"
