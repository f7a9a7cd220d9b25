"""The functions of blocks and half blocks are timm's blocks, in float64, to rounding, and answer on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mnv4_kernels import functional as mk

blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")


def _settled(block: Any) -> Any:
    """In float64 and eval mode, with statistics and layer scales that show errors."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.normal_(module.gamma)
    return block.double().eval().requires_grad_(False)


def _folded(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    return mk.fold_batch_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _vectors(name: str, norm: nn.BatchNorm2d) -> dict[str, torch.Tensor]:
    return dict(zip((f"{name}scale", f"{name}shift"), _folded(norm), strict=True))


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kernels", [(3, 5), (0, 3), (5, 0), (0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["", "same"])
def test_a_whole_block_is_timms(kernels: tuple[int, int], stride: int, padding: str) -> None:
    if stride > 1 and not any(kernels):
        stride = 1
    block = _settled(
        blocks.UniversalInvertedResidual(
            6, 6, *kernels, 0, stride=stride, exp_ratio=2.0, pad_type=padding, layer_scale_init_value=1e-5
        )
    )
    given: dict[str, Any] = {}
    for name, part in (("start", block.dw_start), ("mid", block.dw_mid)):
        if not isinstance(part, nn.Identity):
            given[f"{name}_weight"] = part.conv.weight
            given[f"{name}_stride"] = part.conv.stride
            given[f"{name}_padding"] = padding or part.conv.padding
            given |= _vectors(f"{name}_", part.bn)
    for name, part in (("expand", block.pw_exp), ("project", block.pw_proj)):
        given |= {f"{name}_weight": part.conv.weight, **_vectors(f"{name}_", part.bn)}
    x = _images(2, 6, 8, 7)
    y = mk.uib(x, **given, act="relu", gamma=block.layer_scale.gamma, residual=block.has_skip)
    torch.testing.assert_close(y, block(x))
    assert block.has_skip == (stride == 1)


def test_a_fused_inverted_bottleneck_is_timms() -> None:
    block = _settled(blocks.EdgeResidual(6, 6, exp_kernel_size=3, exp_ratio=2.0))
    x = _images(2, 6, 5, 4)
    y = mk.conv_pwconv(
        x, block.conv_exp.weight, block.conv_pwl.weight, **_vectors("conv_", block.bn1), **_vectors("", block.bn2),
        conv_act="relu", padding=1, residual=x,
    )  # fmt: skip
    torch.testing.assert_close(y, block(x))


def test_a_depthwise_separable_block_is_timms() -> None:
    block = _settled(blocks.DepthwiseSeparableConv(6, 10, dw_kernel_size=5, stride=2))
    x = _images(2, 6, 7, 8)
    y = mk.dwconv_pwconv(
        x, block.conv_dw.weight, block.conv_pw.weight, **_vectors("dw_", block.bn1), **_vectors("", block.bn2),
        dw_act="relu", stride=2, padding=2,
    )  # fmt: skip
    torch.testing.assert_close(y, block(x))


def test_attention_with_its_projections_is_timms() -> None:
    block = _settled(blocks.MobileAttention(12, 12, num_heads=2, key_dim=4, value_dim=6, use_multi_query=True))
    attention, x = block.attn, _images(2, 12, 4, 5)
    source = block.norm(x)
    key, value = (path.proj(source).flatten(2).transpose(1, 2) for path in (attention.key, attention.value))
    y = mk.mqa_projected(
        source, attention.query.proj.weight, key, value, attention.output.proj.weight, heads=2,
        gamma=block.layer_scale.gamma, residual=x,
    )  # fmt: skip
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_attention_block_is_timms(stride: int) -> None:
    block = _settled(
        blocks.MobileAttention(
            12, 12, num_heads=2, key_dim=4, value_dim=6, use_multi_query=True, kv_stride=stride, dw_kernel_size=5
        )
    )
    attention, x = block.attn, _images(2, 12, 6, 5)
    given: dict[str, Any] = _vectors("norm_", block.norm)
    for name, path in (("key", attention.key), ("value", attention.value)):
        if stride > 1:
            given |= {f"{name}_down": path.down_conv.weight, **_vectors(f"{name}_", path.norm)}
            given |= {"stride": path.down_conv.stride, "padding": path.down_conv.padding}
    y = mk.mobile_attention(
        x, attention.query.proj.weight, attention.key.proj.weight, attention.value.proj.weight,
        attention.output.proj.weight, heads=2, gamma=block.layer_scale.gamma, residual=True, **given,
    )  # fmt: skip
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_answer_lies_in_memory_as_the_input_does(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=memory_format)
    expand, project, depthwise = torch.randn(8, 6, 1, 1), torch.randn(6, 8, 1, 1), torch.randn(6, 1, 3, 3)
    key = torch.randn(2, 7, 4)
    for y in (
        mk.uib(x, expand, project, start_weight=depthwise, residual=True),
        mk.dwconv_pwconv(x, depthwise, expand, padding=1),
        mk.conv_pwconv(x, torch.randn(8, 6, 3, 3), project, stride=2),
        mk.mqa_projected(x, expand, key, key, project, heads=2),
    ):
        assert y.is_contiguous(memory_format=memory_format)


def test_low_precision_rounds_what_is_between_two_products_once() -> None:
    x, depthwise = torch.randn(2, 6, 4, 5).bfloat16(), torch.randn(6, 1, 3, 3).bfloat16()
    weight = torch.randn(8, 6, 1, 1).bfloat16()
    between = mk.dwconv_bn_act(x, depthwise, padding=1, act="silu")
    y = mk.dwconv_pwconv(x, depthwise, weight, padding=1, dw_act="silu")
    torch.testing.assert_close(y, mk.pwconv_bn_act(between, weight))
