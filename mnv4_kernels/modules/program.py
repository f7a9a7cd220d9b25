"""From the steps of timm's blocks to the engine's program: nodes and folded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.engine.rows import act_code, fields, pad_mode, row
from . import folding, leaves
from .head import Head
from .multi_query import MultiQuery
from .steps import Convolution, Own, Step

#: Tags of a program's outputs: a run asks for those of one tag.
RESULT = 0
FEATURES = 1


#: How timm's BlurPool2d names its padding -> how the engine does.
_BLUR_PADDING = {"reflect": "reflect", "constant": "explicit"}


class UnsupportedError(Exception):
    """A piece that the engine has no node for; the text says which and why."""


class ProgramBuilder:
    """Appends nodes; every method returns the new node's id.

    Args:
        channels: of the input.
        dtype: weights are rounded to it before they are kept in float32.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self.rows: list[list[int]] = []
        self.arrays: list[torch.Tensor] = []
        self._dtype = dtype
        self._add("input", -1, channels=channels)

    @property
    def bfloat16(self) -> bool:
        """Whether the program multiplies in bfloat16 where the processor does."""
        return self._dtype == torch.bfloat16

    def _add(self, kind: str, source: int, **values: int) -> int:
        self.rows.append(row(kind, source, len(self.arrays), **values))
        return len(self.rows) - 1

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self._dtype).float().contiguous()

    def _vector(self, vector: torch.Tensor | None, size: int) -> torch.Tensor:
        return torch.zeros(size) if vector is None else vector.float().contiguous()

    def _geometry(self, conv: nn.Conv2d) -> dict[str, int]:
        padding = leaves.static_padding(conv)
        top, bottom, left, right = padding or (0, 0, 0, 0)
        return {
            **_pairs("kernel", conv.kernel_size),
            **_pairs("stride", conv.stride),
            **_pairs("dilation", conv.dilation),
            "pad_top": top,
            "pad_bottom": bottom,
            "pad_left": left,
            "pad_right": right,
            "pad_mode": pad_mode("same" if padding is None else "explicit"),
        }

    def output(self, source: int, tag: int) -> int:
        """Hands out node `source` to runs that ask for `tag`."""
        return self._add("output", source, channels=tag)

    def steps(self, steps: Sequence[Step], source: int, *, residual: bool = False) -> int:
        """The nodes of a block; raises `UnsupportedError` before adding any."""
        for step in steps:
            reason = _obstacle(step)
            if reason:
                raise UnsupportedError(reason)
        if not steps:
            return source
        last = steps[-1]
        if residual and not (isinstance(last, Convolution | MultiQuery) and last.takes_residual):
            raise UnsupportedError("a skip around a block that ends in no projection")
        node = source
        for step in steps:
            node = self._step(step, node, source if residual and step is last else -1)
        return node

    def _step(self, step: Any, source: int, residual: int) -> int:
        if isinstance(step, Convolution):
            return self._convolution(step, source, residual)
        if isinstance(step, MultiQuery):
            return self._attention(step, source, residual)
        if isinstance(step, Head):
            return self._head(step, source)
        return self._pool(step.module, source)

    def _convolution(self, step: Convolution, source: int, residual: int) -> int:
        conv = step.conv
        gamma: Any = None if step.layer_scale is None else step.layer_scale.gamma
        scale, shift = folding.epilogue_of(conv, step.norm, gamma)
        kind = {"dwconv_bn_act": "depthwise", "pwconv_bn_act": "pointwise"}.get(step.op, "conv")
        node = self._add(
            kind,
            source,
            residual=residual,
            channels=conv.out_channels,
            act=act_code(step.act_name),
            **self._geometry(conv),
        )
        weight = folding._scaled(conv.weight.detach().double(), scale)
        self.arrays += [self._weight(weight), self._vector(shift, conv.out_channels)]
        return node

    def _head(self, head: Head, source: int) -> int:
        channels = head.expand.conv.in_channels
        node = self._add("pool", source, channels=channels)
        conv = head.expand.conv
        scale, shift = folding.epilogue_of(conv, head.expand.norm, None)
        node = self._add("linear", node, channels=conv.out_channels, act=act_code(head.expand.act_name))
        weight = folding._scaled(conv.weight.detach().double(), scale)
        self.arrays += [self._weight(weight), self._vector(shift, conv.out_channels)]
        linear = head.classifier
        if linear is None:
            return node
        node = self._add("linear", node, channels=linear.out_features)
        bias = None if linear.bias is None else linear.bias.detach()
        self.arrays += [self._weight(linear.weight.detach().double()), self._vector(bias, linear.out_features)]
        return node

    def _attention(self, step: MultiQuery, source: int, residual: int) -> int:
        attention: Any = step.attention
        query, output = attention.query.proj, attention.output.proj
        norm = None if step.norm is None else folding.affine_of(step.norm)
        paths = [dict(path._modules) for path in (attention.key, attention.value)]
        down = paths[0].get("down_conv")
        node = self._add(
            "attention",
            source,
            residual=residual,
            channels=output.out_channels,
            heads=attention.num_heads,
            key_dim=attention.key_dim,
            value_dim=attention.value_dim,
            **({} if down is None else self._geometry(down)),
        )
        inputs = query.in_channels
        identity = (torch.ones(inputs), torch.zeros(inputs))
        scale, shift = identity if norm is None else norm
        arrays = [self._vector(scale, inputs), self._vector(shift, inputs), *self._projection(query, norm)]
        for modules in paths:
            if down is None:
                arrays += [torch.zeros(0), torch.zeros(inputs), *self._projection(modules["proj"], norm)]
                continue
            factor, offset = folding.affine_of(modules["norm"])
            weight = folding._scaled(modules["down_conv"].weight.detach().double(), factor)
            arrays += [self._weight(weight), self._vector(offset, inputs), *self._projection(modules["proj"], None)]
        gamma: Any = None if step.layer_scale is None else step.layer_scale.gamma
        scale_out, shift_out = folding.epilogue_of(output, None, gamma)
        weight = folding._scaled(output.weight.detach().double(), scale_out)
        self.arrays += [*arrays, self._weight(weight), self._vector(shift_out, output.out_channels)]
        return node

    def _projection(self, conv: nn.Conv2d, norm: Any) -> list[torch.Tensor]:
        weight = conv.weight.detach().double().flatten(1)
        shift = None if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            moved = weight @ norm[1]
            shift = moved if shift is None else shift + moved
            weight = weight * norm[0]
        return [self._weight(weight), self._vector(shift, conv.out_channels)]

    def _pool(self, pool: Any, source: int) -> int:
        channels = self.rows[source][fields().index("channels")]
        if isinstance(pool, nn.AvgPool2d):
            kernel, stride, padding = (_pair(value) for value in (pool.kernel_size, pool.stride, pool.padding))
            weight = torch.full((channels, 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
            pads = (padding[0], padding[0], padding[1], padding[1])
            mode = "explicit"
        else:
            kernel, stride = (pool.filt_size, pool.filt_size), _pair(pool.stride)
            weight = pool.filt.detach().float().expand(channels, 1, *kernel).contiguous()
            pads = (pool.padding[2], pool.padding[3], pool.padding[0], pool.padding[1])
            mode = _BLUR_PADDING[pool.pad_mode]
        names = ("pad_top", "pad_bottom", "pad_left", "pad_right")
        node = self._add(
            "depthwise",
            source,
            channels=channels,
            pad_mode=pad_mode(mode),
            **_pairs("kernel", kernel),
            **_pairs("stride", stride),
            **dict(zip(names, pads, strict=True)),
        )
        self.arrays += [weight.contiguous(), torch.zeros(channels)]
        return node

    def finish(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(program [nodes, fields] int64, arrays float32)."""
        return torch.tensor(self.rows, dtype=torch.int64), self.arrays


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pairs(name: str, values: Sequence[int] | int) -> dict[str, int]:
    height, width = _pair(values)
    return {f"{name}_h": height, f"{name}_w": width}


def _obstacle(step: Any) -> str:
    """Why the engine has no node for `step`; empty: it has."""
    if isinstance(step, Convolution | Head):
        return ""
    if isinstance(step, MultiQuery):
        attention: Any = step.attention
        root = float(attention.key_dim) ** -0.5
        return "" if abs(step.scale - root) <= 1e-12 else f"attention scale {step.scale}"
    assert isinstance(step, Own)
    pool: Any = step.module
    if type(pool) is nn.AvgPool2d:
        if pool.ceil_mode or pool.divisor_override or (pool.padding != 0 and not pool.count_include_pad):
            return f"{step.name}: AvgPool2d with ceil_mode, divisor_override or uncounted padding"
        return ""
    if type(pool).__name__ == "BlurPool2d" and getattr(pool, "pad_mode", "") in _BLUR_PADDING:
        return ""
    return f"{step.name}: {step.reason}"
