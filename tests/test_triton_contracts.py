"""The ops of whole half blocks and blocks keep their contracts: opcheck, autocast, gradients, and what they compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnv4_kernels.ops.conv_bn_act import conv_bn_act
from mnv4_kernels.ops.conv_pwconv import conv_pwconv
from mnv4_kernels.ops.dwconv_bn_act import dwconv_bn_act
from mnv4_kernels.ops.dwconv_pwconv import dwconv_pwconv
from mnv4_kernels.ops.mqa_projected import mqa_projected
from mnv4_kernels.ops.pwconv_bn_act import pwconv_bn_act
from mnv4_kernels.ops.uib import uib

GEOMETRY = ([2, 1], [1, 2, 0, 1], [1, 1])


def _x(layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if layout == "sliced":
        wide = torch.randn(2, 24, 6, 7).contiguous(memory_format=torch.channels_last)
        return wide[:, 4:16, :, 1:].to(dtype)
    x = torch.randn(2, 12, 6, 6).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def _affine(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(channels) + 0.5, torch.randn(channels)


def _half_block(op: Any, layout: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = _x(layout, dtype)
    hidden = 12 if op is dwconv_pwconv else 10
    first = torch.randn(hidden, 1 if op is dwconv_pwconv else 12, 3, 3).to(dtype)
    second = torch.randn(9, hidden, 1, 1).to(dtype)
    out = (x.shape[0], 9, 4, x.shape[3] - 1)
    residual = torch.randn(out).to(dtype)
    return (x, first, *_affine(hidden), *GEOMETRY, "relu", second, *_affine(9), "hard_swish", torch.rand(9), residual)


def _block(
    layout: str, kernels: tuple[int, int] = (3, 5), dtype: torch.dtype = torch.float32, residual: bool = True
) -> tuple[Any, ...]:
    x = _x(layout, dtype)

    def depthwise(channels: int, kernel: int) -> tuple[Any, ...]:
        geometry = ([1, 1], [kernel // 2] * 4, [1, 1])
        if not kernel:
            return (None, None, None, *geometry)
        return (torch.randn(channels, 1, kernel, kernel).to(dtype), *_affine(channels), *geometry)

    def product(outputs: int, channels: int) -> tuple[Any, ...]:
        return (torch.randn(outputs, channels, 1, 1).to(dtype) / 4, *_affine(outputs))

    outputs = 12 if residual else 9
    first, second = depthwise(12, kernels[0]), depthwise(20, kernels[1])
    return (x, *first, *product(20, 12), *second, "relu", *product(outputs, 20), torch.rand(outputs), residual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("op", [dwconv_pwconv, conv_pwconv], ids=str)
def test_opcheck_passes_for_half_blocks_in_every_layout(op: Any, layout: str) -> None:
    torch.library.opcheck(op, _half_block(op, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_passes_for_whole_blocks_in_every_layout(layout: str) -> None:
    torch.library.opcheck(uib, _block(layout))


@pytest.mark.parametrize("kernels", [(0, 3), (5, 0), (0, 0)])
def test_opcheck_passes_for_blocks_without_some_depthwise(kernels: tuple[int, int]) -> None:
    torch.library.opcheck(uib, _block("channels_last", kernels, residual=False))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_passes_for_attention_between_its_projections_in_every_layout(layout: str) -> None:
    x = _x(layout)
    key, value = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    query, output = torch.randn(8, 12, 1, 1), torch.randn(12, 6, 1, 1)
    torch.library.opcheck(
        mqa_projected, (x, query, *_affine(8), key, value, output, torch.rand(12), x, 2, 0.5), atol=1e-5, rtol=1e-5
    )


def test_the_halves_are_what_their_names_say() -> None:
    arguments = _half_block(dwconv_pwconv, "channels_last")
    x, weight, *affine = arguments[:4]
    h = dwconv_bn_act(x, weight, *affine, *GEOMETRY, "relu")
    torch.testing.assert_close(dwconv_pwconv(*arguments), pwconv_bn_act(h, *arguments[8:]))
    arguments = _half_block(conv_pwconv, "channels_last")
    x, weight, *affine = arguments[:4]
    h = conv_bn_act(x, weight, *affine, *GEOMETRY, "relu", True)
    torch.testing.assert_close(conv_pwconv(*arguments), pwconv_bn_act(h, *arguments[8:]))


def test_a_block_is_its_four_convolutions_its_scale_and_its_shortcut() -> None:
    arguments = _block("channels_last")
    x, start, expand, mid = arguments[0], arguments[1:7], arguments[7:10], arguments[10:16]
    project, gamma = arguments[17:20], arguments[20]
    h = pwconv_bn_act(dwconv_bn_act(x, *start, "none"), *expand, "relu", None, None)
    y = pwconv_bn_act(dwconv_bn_act(h, *mid, "relu"), *project, "none", gamma, x)
    torch.testing.assert_close(uib(*arguments), y)


def test_gradients_of_a_block_are_those_of_its_reference() -> None:
    arguments = _block("contiguous", dtype=torch.float64)
    tensors = [value for value in arguments if torch.is_tensor(value) and value.dtype == torch.float64]
    for value in tensors:
        value.requires_grad_()
    found = torch.autograd.grad(uib(*arguments).square().sum(), tensors)
    step = torch.randn_like(tensors[0]) * 1e-6
    with torch.no_grad():
        more, less = (uib(arguments[0] + sign * step, *arguments[1:]).square().sum() for sign in (1, -1))
    torch.testing.assert_close((more - less) / 2, (found[0] * step).sum(), rtol=1e-4, atol=1e-9)
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in found)


def test_autocast_casts_operands_and_leaves_scales_alone() -> None:
    arguments = _block("channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        y = uib(*arguments)
    assert y.dtype == torch.bfloat16
    cast = [value.bfloat16() if torch.is_tensor(value) and value.dim() == 4 else value for value in arguments]
    assert torch.equal(y, uib(*cast))


@pytest.mark.parametrize("batch", [0, 1])
def test_a_block_of_no_images_is_empty(batch: int) -> None:
    arguments = _block("channels_last")
    y = uib(arguments[0][:batch], *arguments[1:])
    assert y.shape == (batch, 12, 6, 6)
