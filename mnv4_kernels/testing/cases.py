"""Calls of every op that has a C++ kernel: chosen shapes, laid out and typed on demand, always from a seed.

A `Case` is an op and its geometry; `arguments` draws the tensors. Batch-norm statistics and
layer scales are spread out, since values near 0 and 1 hide errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops.layout import same_padding
from .layouts import lay_out

Padding = tuple[int, int, int, int]


class Draw:
    """Tensors of one call, in its dtype and layouts."""

    def __init__(self, dtype: torch.dtype, layout: str, weight_layout: str, seed: int) -> None:
        self._dtype, self._layout, self._weight_layout = dtype, layout, weight_layout
        self._generator = torch.Generator().manual_seed(seed)

    def activation(self, *shape: int) -> torch.Tensor:
        """Normal values, laid out as the call's activations are."""
        return lay_out(self._normal(shape).to(self._dtype), self._layout)

    def weight(self, *shape: int) -> torch.Tensor:
        """Normal values that keep the variance of what they are applied to."""
        fan_in = max(1, int(torch.Size(shape[1:]).numel()))
        return lay_out((self._normal(shape) / fan_in**0.5).to(self._dtype), self._weight_layout)

    def channels(self, count: int, around: float = 0.0) -> torch.Tensor:
        """One value a channel, in the dtype that scales and shifts have."""
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        return (self._normal((count,)) * 0.5 + around).to(dtype)

    def bias(self, count: int) -> torch.Tensor:
        """One value a channel, in the call's dtype."""
        return self._normal((count,)).to(self._dtype)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    label: str
    _draw: Callable[[Draw], tuple[Any, ...]]

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        weight_layout: str = "contiguous",
        seed: int = 0,
    ) -> tuple[Any, ...]:
        """The op's positional arguments, but for packed weights.

        Args:
            dtype: of activations and weights; scales and shifts are float32 (float64 beside float64).
            layout: of the activations, one of `LAYOUTS`.
            weight_layout: of the weights, one of `LAYOUTS`.
            seed: of the values.
        """
        return self._draw(Draw(dtype, layout, weight_layout, seed))

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def geometry(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, padding: Padding | str, dilation: int
) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) as the ops take them."""
    if isinstance(padding, str):
        padding = (
            *same_padding(size[0], kernel[0], stride, dilation),
            *same_padding(size[1], kernel[1], stride, dilation),
        )
    return [stride, stride], list(padding), [dilation, dilation]


def dwconv(
    channels: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: Padding | str = "same",
    dilation: int = 1,
    act: str = "none",
    affine: bool = True,
) -> Case:
    """A call of `dwconv_bn_act`."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        weight = d.weight(channels, 1, *kernel)
        scale, shift = (d.channels(channels, 1.0), d.channels(channels)) if affine else (None, None)
        return x, weight, scale, shift, *geometry(size, kernel, stride, padding, dilation), act

    label = (
        f"n{batch}c{channels}_{size[0]}x{size[1]}_k{kernel[0]}x{kernel[1]}s{stride}d{dilation}"
        f"_p{padding if isinstance(padding, str) else ''.join(map(str, padding))}_{act}{'' if affine else '_plain'}"
    )
    return Case("dwconv_bn_act", label, draw)


def conv(
    channels: int,
    filters: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: Padding | str = "same",
    dilation: int = 1,
    act: str = "none",
    affine: bool = True,
    channels_last: bool = False,
) -> Case:
    """A call of `conv_bn_act`."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        weight = d.weight(filters, channels, *kernel)
        scale, shift = (d.channels(filters, 1.0), d.channels(filters)) if affine else (None, None)
        return x, weight, scale, shift, *geometry(size, kernel, stride, padding, dilation), act, channels_last

    label = (
        f"n{batch}c{channels}k{filters}_{size[0]}x{size[1]}_k{kernel[0]}x{kernel[1]}s{stride}d{dilation}"
        f"_p{padding if isinstance(padding, str) else ''.join(map(str, padding))}_{act}"
        f"{'' if affine else '_plain'}{'_to_nhwc' if channels_last else ''}"
    )
    return Case("conv_bn_act", label, draw)


def pwconv(
    channels: int,
    filters: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    act: str = "none",
    affine: bool = True,
    gamma: bool = False,
    residual: bool = False,
) -> Case:
    """A call of `pwconv_bn_act`."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        weight = d.weight(filters, channels, 1, 1)
        scale, shift = (d.channels(filters, 1.0), d.channels(filters)) if affine else (None, None)
        layer_scale = d.channels(filters) if gamma else None
        skip = d.activation(batch, filters, *size) if residual else None
        return x, weight, scale, shift, act, layer_scale, skip

    options = "".join(
        f"_{name}" for name, on in (("plain", not affine), ("gamma", gamma), ("residual", residual)) if on
    )
    return Case("pwconv_bn_act", f"n{batch}c{channels}k{filters}_{size[0]}x{size[1]}_{act}{options}", draw)


def kv_downsample(
    channels: int,
    key: int,
    value: int,
    size: tuple[int, int],
    *,
    batch: int = 1,
    kernel: tuple[int, int] | None = (3, 3),
    stride: int = 2,
    padding: Padding | str = "same",
    dilation: int = 1,
    affine: bool = True,
) -> Case:
    """A call of `kv_downsample`; kernel None: projections only."""

    def path(d: Draw, depth: int) -> tuple[torch.Tensor | None, ...]:
        down = None if kernel is None else d.weight(channels, 1, *kernel)
        scale, shift = (d.channels(channels, 1.0), d.channels(channels)) if affine else (None, None)
        return down, scale, shift, d.weight(depth, channels, 1, 1)

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        none = ([1, 1], [0, 0, 0, 0], [1, 1])
        form = none if kernel is None else geometry(size, kernel, stride, padding, dilation)
        return x, *path(d, key), *path(d, value), *form

    down = "no_down" if kernel is None else f"k{kernel[0]}x{kernel[1]}s{stride}d{dilation}"
    label = f"n{batch}c{channels}_{key}_{value}_{size[0]}x{size[1]}_{down}{'' if affine else '_plain'}"
    return Case("kv_downsample", label, draw)


def mqa(
    heads: int, key: int, value: int, positions: int, size: tuple[int, int], *, batch: int = 1, sharpness: float = 1.0
) -> Case:
    """A call of `mqa`; a large `sharpness` makes the softmax nearly one-hot."""

    def draw(d: Draw) -> tuple[Any, ...]:
        query = d.activation(batch, heads * key, *size)
        return query, d.activation(batch, positions, key), d.activation(batch, positions, value), heads, scale

    scale = sharpness * key**-0.5
    sharp = "" if sharpness == 1.0 else f"_x{sharpness:g}"
    return Case("mqa", f"n{batch}h{heads}_{key}_{value}_p{positions}_{size[0]}x{size[1]}{sharp}", draw)


def head(
    channels: int,
    features: int,
    classes: int | None,
    size: tuple[int, int],
    *,
    batch: int = 1,
    act: str = "relu",
    affine: bool = True,
    bias: bool = True,
) -> Case:
    """A call of `head`; classes None: features only."""

    def draw(d: Draw) -> tuple[Any, ...]:
        x = d.activation(batch, channels, *size)
        weight = d.weight(features, channels, 1, 1)
        scale, shift = (d.channels(features, 1.0), d.channels(features)) if affine else (None, None)
        if classes is None:
            return x, weight, scale, shift, act, None, None
        return x, weight, scale, shift, act, d.weight(classes, features), d.bias(classes) if bias else None

    label = f"n{batch}c{channels}f{features}_{classes or 'features'}_{size[0]}x{size[1]}_{act}"
    return Case("head", f"{label}{'' if affine else '_plain'}{'' if bias else '_no_bias'}", draw)


#: Shapes chosen to meet each edge once: channel tails, odd and oblong maps, maps of one pixel, empty batches.
CASES: tuple[Case, ...] = (
    dwconv(1, (7, 5), act="relu"),
    dwconv(3, (8, 11), stride=2, act="relu6"),
    dwconv(8, (14, 14), kernel=(5, 5), act="hard_swish"),
    dwconv(15, (9, 13), kernel=(5, 5), stride=2, act="silu"),
    dwconv(16, (7, 7), batch=3, act="gelu"),
    dwconv(16, (16, 15), kernel=(7, 7), stride=2, act="gelu_tanh"),
    dwconv(17, (10, 10), kernel=(7, 7), act="relu"),
    dwconv(24, (12, 7), dilation=2, act="relu"),
    dwconv(33, (11, 9), kernel=(5, 5), dilation=2, stride=2, act="relu"),
    dwconv(40, (1, 1), kernel=(5, 5), act="relu"),
    dwconv(40, (1, 9), stride=2, padding=(1, 1, 1, 1)),
    dwconv(64, (28, 28), stride=2, padding=(1, 1, 1, 1), act="relu"),
    dwconv(96, (14, 13), batch=3, kernel=(5, 5), stride=2, padding=(2, 2, 2, 2), act="relu"),
    dwconv(96, (7, 7), kernel=(5, 5), padding=(0, 0, 0, 0), affine=False),
    dwconv(32, (6, 8), kernel=(3, 5), padding=(2, 0, 1, 3), act="silu"),
    dwconv(16, (5, 5), kernel=(3, 3), padding=(4, 5, 4, 5), stride=2, act="relu"),
    dwconv(16, (6, 6), kernel=(2, 2), padding="same"),
    dwconv(16, (6, 6), kernel=(1, 1), act="hard_swish"),
    dwconv(24, (9, 9), stride=3, act="relu"),
    dwconv(24, (9, 9), batch=0, act="relu"),
    conv(3, 16, (17, 15), stride=2, padding=(1, 1, 1, 1), act="relu", channels_last=True),
    conv(3, 32, (32, 32), batch=3, stride=2, act="relu6", channels_last=True),
    conv(1, 24, (11, 8), stride=2, act="hard_swish"),
    conv(4, 17, (9, 9), stride=2, act="silu"),
    conv(8, 33, (7, 12), act="gelu"),
    conv(16, 64, (14, 14), stride=2, padding=(1, 1, 1, 1), act="relu"),
    conv(33, 40, (9, 7), stride=2, act="gelu_tanh"),
    conv(24, 15, (8, 8), dilation=2, act="relu"),
    conv(32, 96, (1, 1), act="relu"),
    conv(17, 1, (6, 9), kernel=(5, 5), affine=False),
    conv(16, 16, (10, 6), kernel=(3, 5), padding=(2, 0, 1, 3), act="relu"),
    conv(16, 16, (6, 6), kernel=(2, 2), stride=2, padding=(0, 0, 0, 0)),
    conv(8, 8, (5, 5), padding=(3, 4, 3, 4), act="relu"),
    conv(3, 8, (9, 9), batch=0, stride=2, act="relu", channels_last=True),
    pwconv(1, 1, (3, 5), act="relu"),
    pwconv(3, 17, (7, 5), act="relu6"),
    pwconv(8, 96, (9, 9), batch=3, act="hard_swish"),
    pwconv(15, 40, (5, 13), act="silu", gamma=True),
    pwconv(16, 64, (14, 14), act="gelu", gamma=True, residual=True),
    pwconv(17, 33, (6, 7), act="gelu_tanh", residual=True),
    pwconv(24, 24, (8, 8), gamma=True, residual=True),
    pwconv(33, 16, (1, 1), act="relu"),
    pwconv(40, 15, (1, 13), batch=3, residual=True),
    pwconv(64, 96, (7, 7), affine=False),
    pwconv(96, 64, (7, 7), batch=3, gamma=True, residual=True),
    pwconv(96, 8, (4, 4), affine=False, gamma=True),
    pwconv(384, 64, (7, 7), residual=True),
    pwconv(16, 24, (4, 4), batch=0, act="relu", residual=True),
    kv_downsample(1, 1, 3, (5, 4)),
    kv_downsample(24, 16, 8, (9, 7), batch=3),
    kv_downsample(33, 17, 15, (8, 8), kernel=(5, 5)),
    kv_downsample(64, 64, 64, (16, 16), padding=(1, 1, 1, 1)),
    kv_downsample(96, 48, 48, (7, 11), affine=False),
    kv_downsample(40, 64, 64, (8, 6), kernel=None, affine=False),
    kv_downsample(16, 24, 40, (3, 3), kernel=None),
    kv_downsample(16, 16, 16, (1, 1), stride=1),
    kv_downsample(16, 16, 16, (8, 8), batch=0),
    mqa(1, 1, 1, 1, (1, 1)),
    mqa(4, 64, 64, 16, (8, 8)),
    mqa(8, 48, 48, 36, (6, 12), batch=3),
    mqa(3, 17, 15, 13, (5, 7)),
    mqa(2, 8, 33, 100, (9, 3), sharpness=20.0),
    mqa(4, 64, 64, 300, (3, 3), batch=3),
    mqa(4, 16, 16, 9, (3, 3), batch=0),
    head(1, 1, 1, (1, 1)),
    head(33, 64, 10, (7, 7), batch=3),
    head(96, 40, 17, (3, 5), act="hard_swish", bias=False),
    head(24, 96, None, (8, 8), act="silu"),
    head(64, 128, 100, (1, 9), batch=3, act="none", affine=False),
    head(16, 24, 8, (4, 4), batch=0),
)
