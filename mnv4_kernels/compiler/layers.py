"""Layers of a region: what one row of the engine's program computes, collected call by call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..ops.engine import encode
from ..ops.engine.builder import Geometry
from ..ops.engine.rows import act_code, row
from ..ops.subnetwork import Fold, Mean, recipe
from .calls import AveragePool, Conv, Linear, Norm, Pad, value_of

#: how far a layer is: what may follow a convolution comes in this order, each at most once
CONVOLVED, NORMALISED, SCALED, DONE = range(4)


@dataclasses.dataclass(eq=False)
class Layer:
    """A row of the program."""

    kind: str
    source: Layer | None
    channels: int
    #: the row's further columns
    columns: dict[str, int] = dataclasses.field(default_factory=dict)
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    norm: Norm | None = None
    #: factors of a layer scale
    scale: fx.Node | None = None
    #: height and width of an average pool's window
    window: tuple[int, int] | None = None
    act: str = "none"
    residual: Layer | None = None
    stage: int = DONE

    @property
    def is_map(self) -> bool:
        """True for [N, C, H, W], False for what follows the pool."""
        return self.kind not in ("pool", "linear")

    def nodes(self) -> list[fx.Node]:
        """The graph's tensors that it reads, but for its input."""
        norm = [] if self.norm is None else [self.norm.mean, self.norm.var, self.norm.gamma, self.norm.beta]
        return [node for node in (self.weight, self.bias, *norm, self.scale) if node is not None]


def convolution(call: Conv, source: Layer, pad: Pad | None) -> Layer | None:
    """The layer of a convolution behind a frame `pad`; None where the engine has none for it."""
    weight = value_of(call.weight)
    if weight is None or weight.dim() != 4:
        return None
    filters, depth, *kernel = (int(size) for size in weight.shape)
    depthwise = call.groups == filters == source.channels and depth == 1 and call.groups > 1
    if not depthwise and (call.groups != 1 or depth != source.channels):
        return None
    if not source.is_map:
        pointwise = kernel == [1, 1] and not any(call.padding) and pad is None and not depthwise
        return dense(call, source, filters) if pointwise else None
    padding, mode = call.padding, "explicit"
    if pad is not None:
        if pad.reflect and (not depthwise or any(call.padding)):
            return None
        mode = "reflect" if pad.reflect else mode
        padding = tuple(a + b for a, b in zip(padding, pad.padding, strict=True))  # type: ignore[assignment]
    plain = kernel == [1, 1] and call.stride == (1, 1) and not any(padding)
    kind = "depthwise" if depthwise else "pointwise" if plain else "conv"
    columns = Geometry(kernel, call.stride, padding, call.dilation).columns(mode)
    return Layer(kind, source, filters, columns, call.weight, call.bias, stage=CONVOLVED)


def dense(call: Conv | Linear, source: Layer, outputs: int) -> Layer:
    """The layer of a product with pooled features."""
    return Layer("linear", source, outputs, {}, call.weight, call.bias, stage=CONVOLVED)


def average(call: AveragePool, source: Layer) -> Layer:
    """The layer of an average pool."""
    columns = Geometry(call.kernel, call.stride, call.padding).columns()
    return Layer("depthwise", source, source.channels, columns, window=call.kernel)


@dataclasses.dataclass
class Text:
    """A region as the arguments of `subnetwork`."""

    program: str
    recipe: str
    tensors: list[fx.Node]


def write(layers: Sequence[Layer], outputs: Sequence[Layer]) -> Text:
    """The program of `layers`, in order, the first the input, which hands out `outputs`."""
    numbers = {layer: number for number, layer in enumerate(layers)}
    tensors: dict[fx.Node, int] = {}
    rows: list[list[int]] = []
    entries: list[Fold | Mean] = []

    def index(node: fx.Node | None) -> int:
        return -1 if node is None else tensors.setdefault(node, len(tensors))

    for layer in layers:
        columns = {**layer.columns, "channels": layer.channels, "act": act_code(layer.act)}
        if layer.residual is not None:
            columns["residual"] = numbers[layer.residual]
        source = -1 if layer.source is None else numbers[layer.source]
        rows.append(row(layer.kind, source, 2 * len(entries), **columns))
        entry = _entry(layer, index)
        if entry is not None:
            entries.append(entry)
    rows += [row("output", numbers[layer], 2 * len(entries)) for layer in outputs]
    return Text(encode(rows), recipe.encode(entries), list(tensors))


def _entry(layer: Layer, index: Any) -> Fold | Mean | None:
    if layer.window is not None:
        return Mean(layer.channels, *layer.window)
    if layer.weight is None:
        return None
    fold = Fold(index(layer.weight), index(layer.bias), scale=index(layer.scale))
    norm = layer.norm
    if norm is None:
        return fold
    mean, var, gamma, beta = (index(node) for node in (norm.mean, norm.var, norm.gamma, norm.beta))
    return fold._replace(mean=mean, var=var, gamma=gamma, beta=beta, eps=norm.eps)


def shaped_alike(first: fx.Node, second: fx.Node) -> bool:
    """True if both give tensors of the same size."""
    # as text: comparing symbols would add guards
    sizes = [tuple(map(str, value_of(node).shape)) for node in (first, second) if value_of(node) is not None]
    return len(sizes) == 2 and sizes[0] == sizes[1]
