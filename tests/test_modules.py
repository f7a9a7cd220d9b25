"""The parts that drop-ins are made of: what a leaf is, how it folds, when a plan is stale."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mnv4_kernels.modules import leaves
from mnv4_kernels.modules.folding import affine_of, epilogue_of, operands, pack
from mnv4_kernels.modules.steps import Convolution, Own, convolution, optional
from mnv4_kernels.modules.watch import Watch


def norm(channels: int, **options: Any) -> nn.BatchNorm2d:
    """An eval-mode BatchNorm with values that show errors."""
    found = nn.BatchNorm2d(channels, **options).eval()
    with torch.no_grad():
        for tensor in (found.weight, found.bias, found.running_mean):
            if tensor is not None:
                tensor.uniform_(-1, 1)
        found.running_var.uniform_(0.5, 2)
    return found


@given(
    size=st.integers(1, 70),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
@settings(deadline=None, max_examples=200)
def test_same_padding_is_timms(size: int, kernel: int, stride: int, dilation: int) -> None:
    padding = pytest.importorskip("timm.layers.padding")
    conv = nn.Conv2d(1, 1, kernel, stride, dilation=dilation)
    left, right, top, bottom = padding.pad_same_arg([size, size + 3], [kernel] * 2, [stride] * 2, [dilation] * 2)
    assert leaves.same_padding(conv, size, size + 3) == [top, bottom, left, right]


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
@pytest.mark.parametrize("kernel", [3, 4, (3, 5)])
def test_static_padding_is_torchs(padding: Any, kernel: Any) -> None:
    conv, x = nn.Conv2d(3, 4, kernel, padding=padding, dilation=2), torch.randn(1, 3, 12, 13)
    top, bottom, left, right = leaves.static_padding(conv) or []
    padded = F.pad(x, (left, right, top, bottom))
    torch.testing.assert_close(F.conv2d(padded, conv.weight, conv.bias, dilation=2), conv(x))


@pytest.mark.parametrize(
    ("conv", "op"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "dwconv_bn_act"),
        (nn.Conv2d(8, 16, 1), "pwconv_bn_act"),
        (nn.Conv2d(8, 16, 1, padding="valid"), "pwconv_bn_act"),
        (nn.Conv2d(8, 16, 1, stride=2), "conv_bn_act"),
        (nn.Conv2d(8, 16, 1, padding=1), "conv_bn_act"),
        (nn.Conv2d(8, 16, 3), "conv_bn_act"),
        (nn.Conv2d(1, 1, 1), "pwconv_bn_act"),
    ],
)
def test_the_op_of_a_convolution_follows_from_its_geometry(conv: nn.Conv2d, op: str) -> None:
    assert not leaves.conv_reasons(conv)
    assert leaves.op_of(conv) == op


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardswish(), nn.ReLU6()])
def test_an_activations_name_computes_what_the_module_computes(act: nn.Module) -> None:
    from mnv4_kernels.ops.activation import apply

    x = torch.linspace(-8, 8, 100)
    torch.testing.assert_close(apply(leaves.act_name(act), x), act(x))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_a_folded_norm_is_the_norm(options: dict[str, Any]) -> None:
    batch_norm, x = norm(8, **options).double(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    scale, shift = affine_of(batch_norm)
    torch.testing.assert_close(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), batch_norm(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_an_epilogue_is_bias_norm_and_layer_scale(bias: bool, scaled: bool, normed: bool) -> None:
    conv, x = nn.Conv2d(4, 8, 1, bias=bias).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    batch_norm = norm(8).double() if normed else None
    gamma = torch.randn(8, dtype=torch.float64) if scaled else None
    with torch.no_grad():
        scale, shift = epilogue_of(conv, batch_norm, gamma)
        expected = conv(x) if batch_norm is None else batch_norm(conv(x))
        expected = expected if gamma is None else expected * gamma.view(1, -1, 1, 1)
        y = F.conv2d(x, conv.weight)
        y = y if scale is None else y * scale.view(1, -1, 1, 1)
        y = y if shift is None else y + shift.view(1, -1, 1, 1)
    torch.testing.assert_close(y, expected)


def test_a_folded_weight_is_rounded_once() -> None:
    weight, scale = torch.randn(8, 4, 1, 1), torch.randn(8, dtype=torch.float64)
    found = operands(weight.double(), scale, None, torch.float32, "pwconv_bn_act")
    assert torch.equal(found.weight, (weight.double() * scale.view(-1, 1, 1, 1)).float())
    assert found.scale is None


def test_low_precision_weights_are_not_rounded_again() -> None:
    weight, scale = torch.randn(8, 4, 1, 1).bfloat16(), torch.randn(8, dtype=torch.float64)
    found = operands(weight.double(), scale, None, torch.bfloat16, "pwconv_bn_act")
    assert torch.equal(found.weight, weight)
    assert (found.scale is None) == (found.packed is not None)


def test_weights_are_packed_where_the_library_is() -> None:
    from mnv4_kernels.backends import native

    packed = pack(torch.randn(20, 4, 1, 1, dtype=torch.float64), None, False)
    assert (packed is not None) == native.available()
    assert packed is None or packed.numel() == 32 * 4


def test_what_cannot_be_fused_keeps_every_module_in_order() -> None:
    modules = (nn.Conv2d(8, 8, 3, groups=4), norm(8), nn.Tanh())
    steps = convolution("piece", *modules)
    assert [step.module for step in steps if isinstance(step, Own)] == list(modules)
    reasons = {step.reason for step in steps if isinstance(step, Own)}
    assert reasons == {
        "grouped convolution (4 groups of 2 channels); activation Tanh is not one of the ops'",
    }


def test_what_does_nothing_is_no_step() -> None:
    assert not optional("nothing", None, "")
    assert not optional("nothing", nn.Identity(), "")
    assert not optional("nothing", nn.Sequential(), "")
    assert len(optional("something", nn.Sequential(nn.ReLU()), "why")) == 1


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 24, 3)])
def test_a_prepared_convolution_computes_its_formula(conv: nn.Conv2d) -> None:
    (step,) = convolution("piece", conv, norm(conv.out_channels), nn.ReLU())
    assert isinstance(step, Convolution)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.relu(step.norm(conv(x)))  # type: ignore[misc]
        torch.testing.assert_close(step.formula(x, step.tensors()), expected)
        torch.testing.assert_close(step.prepare()(x), expected, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """Something to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.bn = norm(8)
        self.act = nn.GELU()
        self.flag = True


def watched() -> tuple[Block, Watch]:
    """A block and its watch."""
    block = Block()
    return block, Watch(block, list(block.children()), [(block, ["flag"])])


def test_a_watch_sees_nothing_where_nothing_happened() -> None:
    block, watch = watched()
    block.conv(torch.randn(1, 4, 8, 8)).sum().backward()
    assert watch.unchanged()
    assert not watch.obstacle()


@pytest.mark.parametrize(
    "edit",
    [
        lambda block: setattr(block, "flag", False),
        lambda block: setattr(block, "act", nn.GELU()),
        lambda block: setattr(block.act, "approximate", "tanh"),
        lambda block: setattr(block.conv, "stride", (2, 2)),
        lambda block: setattr(block.conv, "padding", (2, 2)),
        lambda block: setattr(block.conv, "padding_mode", "circular"),
        lambda block: setattr(block.bn, "eps", 0.5),
        lambda block: setattr(block.bn, "running_mean", torch.zeros(8)),
        lambda block: setattr(block.bn, "bias", None),
        lambda block: setattr(block.conv, "bias", nn.Parameter(block.conv.bias.detach().clone())),
        lambda block: setattr(block.conv, "forward", block.conv.forward),
        lambda block: block.bn.running_var.mul_(2),
        lambda block: block.conv.weight.detach().mul_(2),
        lambda block: setattr(block.conv.weight, "data", torch.zeros(8, 4, 3, 3)),
        lambda block: setattr(block.conv.weight, "data", torch.zeros(8, 4, 1, 1)),
        lambda block: block.conv.register_parameter("extra", nn.Parameter(torch.zeros(1))),
        lambda block: block.double(),
    ],
)
def test_a_watch_sees(edit: Any) -> None:
    block, watch = watched()
    edit(block)
    assert not watch.unchanged()


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_watch_names_hooks_and_modes(kind: str) -> None:
    block, watch = watched()
    handle = getattr(block.bn, kind)(lambda *_: None)
    assert "forward hook" in watch.obstacle()
    handle.remove()
    assert not watch.obstacle()
    block.bn.train()
    assert "train mode" in watch.obstacle()


def test_a_watch_costs_microseconds() -> None:
    _, watch = watched()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            watch.unchanged()
        best = min(best, (time.perf_counter() - start) / 100)
    # about 1 us on the development machine; a slow one may take ten times that
    assert best < 20e-6
