"""Calls of the ops of blocks and half blocks; drawn as those of `cases`."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.layout import conv_output_size
from .cases import Case, Draw, Padding, geometry


def _affine(d: Draw, channels: int, given: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (d.channels(channels, 1.0), d.channels(channels)) if given else (None, None)


def half_block(
    op: str,
    channels: int,
    filters: int,
    size: tuple[int, int],
    *,
    hidden: int = 0,
    batch: int = 1,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: Padding | str = "same",
    dilation: int = 1,
    acts: tuple[str, str] = ("relu", "none"),
    affine: bool = True,
    skip: bool = False,
) -> Case:
    """A call of `dwconv_pwconv`, or with `hidden` channels of `conv_pwconv`; `skip`: layer scale and residual."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        inner = hidden or channels
        first = d.weight(inner, channels if hidden else 1, *kernel)
        form = geometry(size, kernel, stride, padding, dilation)
        top, bottom, left, right = form[1]
        out = (
            conv_output_size(size[0], kernel[0], stride, top, bottom, dilation),
            conv_output_size(size[1], kernel[1], stride, left, right, dilation),
        )
        second = (d.weight(filters, inner, 1, 1), *_affine(d, filters, affine), acts[1])
        tail = (d.channels(filters), d.activation(batch, filters, *out)) if skip else (None, None)
        return x, first, *_affine(d, inner, affine), *form, acts[0], *second, *tail

    label = (
        f"n{batch}c{channels}e{hidden or channels}k{filters}_{size[0]}x{size[1]}_k{kernel[0]}x{kernel[1]}"
        f"s{stride}d{dilation}_{'_'.join(acts)}{'' if affine else '_plain'}{'_skip' if skip else ''}"
    )
    return Case(op, label, draw)


def uib(
    channels: int,
    hidden: int,
    filters: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    kernels: tuple[int, int] = (3, 3),
    stride: int = 1,
    act: str = "relu",
    affine: bool = True,
    skip: bool = False,
) -> Case:
    """A call of `uib`; a kernel of 0: that depthwise convolution is missing; `skip`: layer scale and residual."""

    def depthwise(d: Draw, width: int, kernel: int, size: tuple[int, int], stride: int) -> tuple[Any, ...]:
        form = geometry(size, (max(1, kernel),) * 2, stride, "same", 1)
        return (d.weight(width, 1, kernel, kernel), *_affine(d, width, affine), *form) if kernel else (None,) * 3 + form

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        first = 1 if kernels[1] else stride
        middle = (-(-size[0] // first), -(-size[1] // first)) if kernels[0] else size
        start = depthwise(d, channels, kernels[0], size, first if kernels[0] else 1)
        expand = (d.weight(hidden, channels, 1, 1), *_affine(d, hidden, affine))
        mid = depthwise(d, hidden, kernels[1], middle, stride if kernels[1] else 1)
        project = (d.weight(filters, hidden, 1, 1), *_affine(d, filters, affine))
        return x, *start, *expand, *mid, act, *project, d.channels(filters) if skip else None, skip

    label = f"n{batch}c{channels}e{hidden}k{filters}_{size[0]}x{size[1]}_k{kernels[0]}_{kernels[1]}s{stride}_{act}"
    return Case("uib", f"{label}{'' if affine else '_plain'}{'_skip' if skip else ''}", draw)


def mqa_projected(
    channels: int,
    filters: int,
    heads: int,
    key: int,
    value: int,
    positions: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    affine: bool = True,
    skip: bool = False,
) -> Case:
    """A call of `mqa_projected`; `skip`: layer scale and residual."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        query = (d.weight(heads * key, channels, 1, 1), *_affine(d, heads * key, affine))
        paths = (d.activation(batch, positions, key), d.activation(batch, positions, value))
        output = d.weight(filters, heads * value, 1, 1)
        tail = (d.channels(filters), d.activation(batch, filters, *size)) if skip else (None, None)
        return x, *query, *paths, output, *tail, heads, key**-0.5

    label = f"n{batch}c{channels}k{filters}h{heads}_{key}_{value}_p{positions}_{size[0]}x{size[1]}"
    return Case("mqa_projected", f"{label}{'' if affine else '_plain'}{'_skip' if skip else ''}", draw)


def mobile_attention(
    channels: int,
    heads: int,
    key: int,
    value: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    kernel: int = 3,
    outputs: int | None = None,
    norm: bool = True,
    gamma: bool = False,
    residual: bool = False,
) -> Case:
    """A call of `mobile_attention`; `kernel` 0: keys and values are not down-sampled."""
    filters = channels if outputs is None else outputs

    def path(d: Draw, depth: int) -> tuple[torch.Tensor | None, ...]:
        down = (d.weight(channels, 1, kernel, kernel), d.channels(channels, 1.0), d.channels(channels))
        return (*(down if kernel else [None] * 3), d.weight(depth, channels, 1, 1))

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        before = (d.channels(channels, 1.0), d.channels(channels)) if norm else (None, None)
        query = (d.weight(heads * key, channels, 1, 1), None)
        form = geometry(size, (max(kernel, 1),) * 2, 2 if kernel else 1, "same", 1)
        output = (d.weight(filters, heads * value, 1, 1), d.channels(filters), d.channels(filters) if gamma else None)
        return x, *before, *query, *path(d, key), *path(d, value), *form, *output, heads, key**-0.5, residual

    options = "".join(f"_{name}" for name, on in (("plain", not norm), ("gamma", gamma), ("residual", residual)) if on)
    label = f"n{batch}c{channels}h{heads}_{key}_{value}k{filters}_{size[0]}x{size[1]}_down{kernel}{options}"
    return Case("mobile_attention", label, draw)


#: Every optional argument given and absent, channel tails, odd maps, strides, dilation, blocks without some depthwise.
FUSED: tuple[Case, ...] = (
    half_block("dwconv_pwconv", 17, 24, (6, 7), batch=2, acts=("hard_swish", "silu"), skip=True),
    half_block("dwconv_pwconv", 40, 16, (9, 5), kernel=(5, 5), stride=2),
    half_block("dwconv_pwconv", 16, 33, (7, 7), dilation=2, affine=False),
    half_block("conv_pwconv", 16, 24, (7, 6), hidden=40, batch=2, stride=2, acts=("relu", "relu6")),
    half_block("conv_pwconv", 9, 9, (5, 5), hidden=17, skip=True),
    half_block("conv_pwconv", 8, 16, (4, 6), hidden=16, kernel=(1, 3), affine=False),
    uib(16, 48, 16, (7, 7), batch=2, kernels=(3, 5), skip=True),
    uib(17, 33, 24, (8, 6), kernels=(5, 3), stride=2, act="gelu"),
    uib(24, 40, 24, (6, 5), kernels=(0, 3), affine=False),
    uib(16, 32, 17, (6, 6), kernels=(5, 0), stride=2),
    uib(16, 64, 16, (5, 5), kernels=(0, 0), skip=True),
    mqa_projected(24, 24, 2, 16, 16, 9, (6, 5), batch=2, skip=True),
    mqa_projected(17, 40, 3, 8, 33, 20, (4, 4), affine=False),
    mobile_attention(32, 4, 16, 16, (8, 6), residual=True, gamma=True, batch=2),
    mobile_attention(24, 2, 16, 16, (5, 5), kernel=0, outputs=33),
    mobile_attention(16, 2, 8, 24, (7, 6), kernel=5, norm=False),
)
