"""From the steps of timm's blocks to the engine's program: nodes and folded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.engine.affine import behind
from ..ops.engine.builder import Affine, Builder, Geometry, Path, Product
from ..ops.engine.rows import act_code, fields
from ..ops.engine.weights import Weight
from . import folding, leaves
from .head import Head
from .multi_query import MultiQuery, gamma_of
from .steps import Convolution, Own, Step

#: Tags of a program's outputs: a run asks for those of one tag.
RESULT = 0
FEATURES = 1


#: How timm's BlurPool2d names its padding -> how the engine does.
_BLUR_PADDING = {"reflect": "reflect", "constant": "explicit"}


class UnsupportedError(Exception):
    """A piece that the engine has no node for; the text says which and why."""


class ProgramBuilder(Builder):
    """Appends the nodes of timm's modules."""

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
        scale, shift = folding.epilogue_of(conv, step.norm, gamma_of(step.layer_scale))
        kind = {"dwconv_bn_act": "depthwise", "pwconv_bn_act": "pointwise"}.get(step.op, "conv")
        weight = Weight(conv.weight.detach()).scaled(scale)
        return self.convolution(kind, source, weight, shift, step.act_name, _geometry(conv), residual)

    def _head(self, head: Head, source: int) -> int:
        conv = head.expand.conv
        node = self.add("pool", source, channels=conv.in_channels)
        scale, shift = folding.epilogue_of(conv, head.expand.norm, None)
        node = self.add("linear", node, channels=conv.out_channels, act=act_code(head.expand.act_name))
        self.product(Weight(conv.weight.detach()).scaled(scale), shift)
        linear = head.classifier
        if linear is None:
            return node
        node = self.add("linear", node, channels=linear.out_features)
        bias = None if linear.bias is None else linear.bias.detach()
        self.product(Weight(linear.weight.detach()), bias)
        return node

    def _attention(self, step: MultiQuery, source: int, residual: int) -> int:
        attention: Any = step.attention
        norm = None if step.norm is None else folding.affine_of(step.norm)
        output = attention.output.proj
        scale, shift = folding.epilogue_of(output, None, gamma_of(step.layer_scale))
        down = step.path("key").get("down_conv")
        return self.attention(
            source,
            norm,
            _product(attention.query.proj, norm),
            _path(step.path("key"), norm),
            _path(step.path("value"), norm),
            (_matrix(output).scaled(scale), shift),
            attention.num_heads,
            None if down is None else _geometry(down),
            residual,
        )

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
        columns = Geometry(kernel, stride, pads).columns(mode)
        node = self.add("depthwise", source, channels=channels, **columns)
        self.arrays += [weight.contiguous(), torch.zeros(channels)]
        return node


def _geometry(conv: Any) -> Geometry:
    return Geometry(conv.kernel_size, conv.stride, leaves.static_padding(conv), conv.dilation)


def _matrix(conv: nn.Conv2d) -> Weight:
    return Weight(conv.weight.detach().flatten(1))


def _product(conv: nn.Conv2d, norm: Affine | None) -> Product:
    """A 1x1 convolution as matrix and shift, the norm before it folded in."""
    bias = None if conv.bias is None else conv.bias.detach()
    return behind(_matrix(conv), bias, norm or (None, None))


def _path(modules: dict[str, Any], norm: Affine | None) -> Path:
    if "down_conv" not in modules:
        return Path(None, _product(modules["proj"], norm))
    factor, offset = folding.affine_of(modules["norm"])
    weight = Weight(modules["down_conv"].weight.detach()).scaled(factor)
    return Path((weight, offset), _product(modules["proj"], None))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _obstacle(step: Any) -> str:
    """Why the engine has no node for `step`; empty: it has."""
    if isinstance(step, Convolution | Head):
        return ""
    if isinstance(step, MultiQuery):
        attention: Any = step.attention
        root = float(attention.key_dim) ** -0.5
        return "" if abs(step.scale - root) <= 1e-12 else f"attention scale {step.scale}"
    assert isinstance(step, Own)
    return pool_obstacle(step)


def pool_obstacle(step: Own) -> str:
    """Why the engine has no node for a piece that no op computes; empty: it is a pool that it has one for."""
    pool: Any = step.module
    if leaves.tampered(pool):
        return f"{step.name}: {leaves.tampered(pool)}"
    if type(pool) is nn.AvgPool2d:
        if pool.ceil_mode or pool.divisor_override or (pool.padding != 0 and not pool.count_include_pad):
            return f"{step.name}: AvgPool2d with ceil_mode, divisor_override or uncounted padding"
        return ""
    if type(pool) in leaves.BLUR_POOLS and pool.pad_mode in _BLUR_PADDING:
        return ""
    return f"{step.name}: {step.reason}"
