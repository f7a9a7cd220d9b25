"""The training calls of timm's twelve MobileNet-V4 blocks: forward and backward of each op, in the order of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_shapes import AttentionShape, Block, Call, ConvShape, HeadShape

from mnv4_kernels.ops.gpu.gate import ConvPairShape, UibShape
from mnv4_kernels.ops.layout import conv_output_size


@dataclass(frozen=True)
class _Conv:
    """One convolution of a chain; groups are all channels or one."""

    role: str
    channels: int
    outputs: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    #: reads a map as it is, not what a convolution before it left raw
    raw: bool = False
    moments: bool = True
    #: the input is an image, which gets no gradient
    image: bool = False

    @property
    def op(self) -> str:
        """The training op."""
        if self.depthwise:
            return "bn_act_dwconv"
        return "bn_act_pwconv" if self.kernel == 1 and self.stride == 1 else "bn_act_conv"


class _Maker:
    """Tensors of one dtype on one device: random, or shapes only."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device = dtype, device

    def map(self, *size: int) -> torch.Tensor:
        """A channels_last map."""
        if self._device == "meta":
            return torch.empty(size, dtype=self._dtype, device="meta").to(memory_format=torch.channels_last)
        x = torch.randn(size, dtype=self._dtype, device=self._device)
        return x.contiguous(memory_format=torch.channels_last)

    def vector(self, count: int) -> torch.Tensor:
        """[count] positive float32 values."""
        return torch.rand(count, device=self._device) + 0.5

    def norm(self, count: int, act: str) -> tuple[Any, ...]:
        """What is pending on a raw map."""
        return (*(self.vector(count) for _ in range(4)), 1e-5, act)


_RAW: tuple[Any, ...] = (None, None, None, None, 0.0, "none")


def _conv_calls(
    conv: _Conv, name: str, batch: int, size: tuple[int, int], act: str, make: _Maker
) -> tuple[list[Call], tuple[int, int]]:
    pad = conv.kernel // 2
    height, width = (conv_output_size(side, conv.kernel, conv.stride, pad, pad, 1) for side in size)
    x = make.map(batch, conv.channels, *size)
    x = x.contiguous() if conv.image else x
    norm = _RAW if conv.raw else make.norm(conv.channels, act)
    weight = make.map(conv.outputs, 1 if conv.depthwise else conv.channels, conv.kernel, conv.kernel)
    geometry = [] if conv.op == "bn_act_pwconv" else [[conv.stride] * 2, [pad] * 4, [1, 1]]
    last = [True] if conv.op == "bn_act_conv" else []
    z = make.map(batch, conv.outputs, height, width)
    vectors = [make.vector(conv.outputs) for _ in range(3)]
    through = (vectors[0], vectors[1], z, vectors[2]) if conv.moments else (None,) * 4
    grad = make.map(batch, conv.outputs, height, width)
    role = f"{name} {conv.role}".strip()
    calls = [
        Call(conv.op, role, (x, *norm, weight, *geometry, conv.moments, *last)),
        Call(f"{conv.op}_backward", role, (grad, *through, x, *norm, weight, *geometry, not conv.image, True)),
    ]
    return calls, (height, width)


def _chain(block: Block) -> tuple[list[_Conv], bool]:
    """(the block's convolutions in order, whether it adds its input)."""
    shape = block.shape
    if isinstance(shape, UibShape):
        hidden = shape.hidden
        convs = [
            _Conv("dw_start", shape.channels, shape.channels, shape.start_kernel, shape.start_stride, True),
            _Conv("pw_exp", shape.channels, hidden, 1),
            _Conv("dw_mid", hidden, hidden, shape.mid_kernel, shape.mid_stride, True),
            _Conv("pw_proj", hidden, shape.outputs, 1),
        ]
        return [conv for conv in convs if conv.kernel], shape.residual
    if isinstance(shape, ConvPairShape):
        first = _Conv("first", shape.channels, shape.hidden, shape.kernel, shape.stride)
        return [first, _Conv("second", shape.hidden, shape.outputs, 1)], shape.residual
    if isinstance(shape, ConvShape):
        image = shape.image
        conv = _Conv("", shape.channels, shape.outputs, shape.kernel, shape.stride, raw=image, image=image)
        return [conv], shape.residual
    assert isinstance(shape, HeadShape)
    return [_Conv("", shape.channels, shape.features, 1, raw=True)], False


def training_calls(block: Block, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """What a block calls in a step; `device` "meta" for shapes only."""
    make, shape, act = _Maker(dtype, device), block.shape, block.act
    if isinstance(shape, AttentionShape):
        yield from _attention_calls(block.name, shape, make)
        return
    size = (1, 1) if isinstance(shape, HeadShape) else (shape.height, shape.width)
    convs, residual = _chain(block)
    for conv in convs:
        calls, size = _conv_calls(conv, block.name, shape.batch, size, act, make)
        yield from calls
    # what is not added to anything passes on raw
    if residual:
        yield from _end_calls(block.name, (shape.batch, convs[-1].outputs, *size), make)


def _end_calls(name: str, size: tuple[int, ...], make: _Maker) -> Iterator[Call]:
    x, residual = make.map(*size), make.map(*size)
    norm = make.norm(size[1], "none")
    yield Call("bn_act", f"{name} end", (x, *norm, None, None, residual))
    yield Call("bn_act_backward", f"{name} end", (residual, x, *norm, None, None))


def _attention_calls(name: str, shape: AttentionShape, make: _Maker) -> Iterator[Call]:
    batch, channels, size = shape.batch, shape.channels, (shape.height, shape.width)
    queries = shape.heads * shape.key_depth
    yield from _conv_calls(_Conv("query", channels, queries, 1, moments=False), name, batch, size, "none", make)[0]
    small = size
    for role, depth in (("key", shape.key_depth), ("value", shape.value_depth)):
        if shape.stride > 1:
            down = _Conv(f"{role} down", channels, channels, 3, shape.stride, depthwise=True)
            calls, small = _conv_calls(down, name, batch, size, "none", make)
            yield from calls
        project = _Conv(role, channels, depth, 1, moments=False)
        yield from _conv_calls(project, name, batch, small, "none", make)[0]
    positions = small[0] * small[1]
    key = make.map(batch, shape.key_depth, positions, 1)[..., 0].transpose(1, 2)
    value = make.map(batch, shape.value_depth, positions, 1)[..., 0].transpose(1, 2)
    mixed = make.map(batch, shape.heads * shape.value_depth, *size)
    parts = (make.map(batch, queries, *size), key, value, shape.heads, shape.key_depth**-0.5)
    yield Call("mqa", f"{name} attention", parts)
    yield Call("mqa_backward", f"{name} attention", (mixed, *parts))
    output = _Conv("output", shape.heads * shape.value_depth, channels, 1, raw=True, moments=False)
    yield from _conv_calls(output, name, batch, size, "none", make)[0]
    yield from _end_calls(name, (batch, channels, *size), make)
