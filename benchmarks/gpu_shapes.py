"""The blocks of timm's twelve MobileNet-V4, as shapes: what the GPU tables, predictions and campaign run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from mnv4_kernels.ops.gpu.gate import ConvPairShape, UibShape
from mnv4_kernels.ops.gpu.launch import Launch

MODELS = (
    "conv_small_035", "conv_small_050", "conv_small", "conv_medium", "conv_blur_medium", "conv_aa_medium",
    "conv_large", "conv_aa_large", "hybrid_medium_075", "hybrid_medium", "hybrid_large_075", "hybrid_large",
)  # fmt: skip


@dataclass(frozen=True)
class ConvShape:
    """A dense convolution of an image or a map: 'same' padding of an odd kernel."""

    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    kernel: int
    stride: int
    residual: bool = False
    image: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """A MobileAttention; stride 1: keys and values are not downsampled."""

    batch: int
    channels: int
    height: int
    width: int
    heads: int
    key_depth: int
    value_depth: int
    stride: int


@dataclass(frozen=True)
class HeadShape:
    """Pool, 1x1 convolution, classifier."""

    batch: int
    channels: int
    height: int
    width: int
    features: int
    classes: int


Shape = UibShape | ConvShape | ConvPairShape | AttentionShape | HeadShape


@dataclass(frozen=True)
class Block:
    """One block of a model, with the activation of its inner convolutions."""

    name: str
    shape: Shape
    act: str
    #: of the 1x1 convolution of a pair
    second_act: str = "none"
    #: a pair that is two blocks, which nobody joins yet
    across: bool = False


def _act(module: torch.nn.Module) -> str:
    names = {"ReLU": "relu", "ReLU6": "relu6", "Hardswish": "hard_swish", "SiLU": "silu", "GELU": "gelu"}
    return names.get(type(module).__name__, "none")


def _blocks_of_uib(name: str, block: Any, x: torch.Tensor, y: torch.Tensor) -> list[Block]:
    start = None if isinstance(block.dw_start, torch.nn.Identity) else block.dw_start
    mid = None if isinstance(block.dw_mid, torch.nn.Identity) else block.dw_mid
    # an anti-aliased depthwise has stride 1 and a pool behind it, which no kernel of ours runs
    shape = UibShape(
        batch=x.shape[0],
        channels=x.shape[1],
        hidden=block.pw_exp.conv.out_channels,
        outputs=y.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        start_kernel=start.conv.kernel_size[0] if start is not None else 0,
        mid_kernel=mid.conv.kernel_size[0] if mid is not None else 0,
        start_stride=start.conv.stride[0] if start is not None else 1,
        mid_stride=mid.conv.stride[0] if mid is not None else 1,
        residual=block.has_skip,
    )
    return [Block(name, shape, _act(block.pw_exp.bn.act))]


def _conv(name: str, conv: Any, x: torch.Tensor, act: str, residual: bool = False) -> Block:
    batch, channels, height, width = x.shape
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    shape = ConvShape(batch, channels, conv.out_channels, height, width, kernel, stride, residual, channels <= 4)
    return Block(name, shape, act)


def _attention(name: str, block: Any, x: torch.Tensor) -> Block:
    attention = block.attn
    stride = attention.key.down_conv.stride[0] if hasattr(attention.key, "down_conv") else 1
    shape = AttentionShape(*x.shape, attention.num_heads, attention.key_dim, attention.value_dim, stride)
    return Block(name, shape, "none")


@lru_cache(maxsize=64)
def blocks(model: str, batch: int, size: int | None = None) -> tuple[Block, ...]:
    """The blocks of `mobilenetv4_<model>` for [batch, 3, size, size], in order; timm's own size by default."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(f"mobilenetv4_{model}").eval()
    size = size or net.default_cfg["input_size"][-1]
    found: list[Block] = []

    def record(name: str, module: Any) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, kind = inputs[0], type(module).__name__
            if kind == "UniversalInvertedResidual":
                found.extend(_blocks_of_uib(name, module, x, output))
            elif kind == "MobileAttention":
                found.append(_attention(name, module, x))
            elif kind == "EdgeResidual":
                found.append(_conv(f"{name}.conv_exp", module.conv_exp, x, _act(module.bn1.act)))
                middle = x.new_empty((x.shape[0], module.conv_exp.out_channels, *output.shape[2:]))
                found.append(_conv(f"{name}.conv_pwl", module.conv_pwl, middle, "none", module.has_skip))
            elif kind == "ConvBnAct":
                found.append(_conv(name, module.conv, x, _act(module.bn1.act), module.has_skip))
            else:
                raise NotImplementedError(f"{model}: no shape is known for {name}, a {kind}")

        return hook

    for stage_name, stage in net.blocks.named_children():
        for name, block in stage.named_children():
            block.register_forward_hook(record(f"blocks.{stage_name}.{name}", block))
    net.conv_stem.register_forward_hook(
        lambda module, inputs, _: found.append(_conv("conv_stem", module, inputs[0], _act(net.bn1.act)))
    )
    with torch.no_grad():
        x = torch.empty(batch, 3, size, size, device="meta")
        features = net.forward_features(x)
    shape = HeadShape(*features.shape, net.conv_head.out_channels, net.num_classes)
    return (*_paired(found), Block("head", shape, "relu"))


def _paired(found: list[Block]) -> Iterator[Block]:
    """The blocks, with each dense convolution and the 1x1 convolution behind it as one."""
    waiting: Block | None = None
    for block in found:
        first, shape = waiting.shape if waiting else None, block.shape
        if waiting and isinstance(first, ConvShape) and isinstance(shape, ConvShape) and shape.kernel == 1:
            pair = ConvPairShape(
                first.batch, first.channels, first.outputs, shape.outputs, first.height, first.width, first.kernel,
                first.stride, shape.residual,
            )  # fmt: skip
            across = waiting.name.rpartition(".")[0] != block.name.rpartition(".")[0] or waiting.name[-1].isdigit()
            yield Block(f"{waiting.name} + {block.name}", pair, waiting.act, block.act, across)
            waiting = None
            continue
        if waiting:
            yield waiting
        waiting = block if isinstance(shape, ConvShape) and shape.kernel > 1 and not shape.image else None
        if waiting is None:
            yield block
    if waiting:
        yield waiting


def _nhwc(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    if device == "meta":
        return torch.empty(size, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    return torch.randn(size, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)


def _affine(channels: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)


@dataclass(frozen=True)
class Call:
    """One call of an op: its name, the positional arguments of the op's schema, and where it comes from."""

    op: str
    role: str
    arguments: tuple[Any, ...]


def _depthwise_arguments(channels: int, kernel: int, stride: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    from mnv4_kernels.ops.gpu.launch import store_tap_major

    weight = store_tap_major(_nhwc(channels, 1, kernel, kernel, dtype=dtype, device=device))
    return weight, *_affine(channels, device), [stride, stride], [kernel // 2] * 4, [1, 1]


def calls(block: Block, dtype: torch.dtype, device: str, fused: bool | None = None) -> Iterator[Call]:
    """The op calls of a block; `fused` None: both the fused and the unfused half blocks."""
    shape, act = block.shape, block.act
    if isinstance(shape, UibShape):
        yield from _uib_calls(block.name, shape, act, dtype, device, fused)
    elif isinstance(shape, ConvShape):
        yield from _conv_calls(block.name, shape, act, dtype, device)
    elif isinstance(shape, ConvPairShape):
        yield from _pair_calls(block, shape, dtype, device, fused)
    elif isinstance(shape, AttentionShape):
        yield from _attention_calls(block.name, shape, dtype, device, fused)
    else:
        x = _nhwc(shape.batch, shape.channels, shape.height, shape.width, dtype=dtype, device=device)
        weight = _nhwc(shape.features, shape.channels, 1, 1, dtype=dtype, device=device)
        classifier = _nhwc(shape.classes, shape.features, 1, 1, dtype=dtype, device=device)[:, :, 0, 0]
        bias = torch.zeros(shape.classes, dtype=dtype, device=device)
        yield Call("head", block.name, (x, weight, *_affine(shape.features, device), act, classifier, bias))


def _uib_calls(
    name: str, shape: UibShape, act: str, dtype: torch.dtype, device: str, fused: bool | None
) -> Iterator[Call]:
    def make(channels: int, size: tuple[int, int]) -> torch.Tensor:
        return _nhwc(shape.batch, channels, *size, dtype=dtype, device=device)

    x = make(shape.channels, (shape.height, shape.width))
    expanded = make(shape.hidden, shape.middle)
    expand = (
        _nhwc(shape.hidden, shape.channels, 1, 1, dtype=dtype, device=device), *_affine(shape.hidden, device), act,
        None, None,
    )  # fmt: skip
    residual = make(shape.outputs, shape.out) if shape.residual else None
    gamma = torch.rand(shape.outputs, device=device)
    project = (
        _nhwc(shape.outputs, shape.hidden, 1, 1, dtype=dtype, device=device), *_affine(shape.outputs, device), "none",
        gamma, residual,
    )  # fmt: skip
    if not shape.mid_kernel and fused is not False:
        # both products may be one launch
        yield Call("uib", name, uib_arguments(shape, act, dtype, device))
    start = _depthwise_arguments(shape.channels, shape.start_kernel, shape.start_stride, dtype, device)
    mid = _depthwise_arguments(shape.hidden, shape.mid_kernel, shape.mid_stride, dtype, device)
    if shape.start_kernel and fused is not False:
        yield Call("dwconv_pwconv", f"{name} dw_start + pw_exp", (x, *start, "none", *expand))
    if not shape.start_kernel or fused is not True:
        if shape.start_kernel:
            yield Call("dwconv_bn_act", f"{name} dw_start", (x, *start, "none"))
        yield Call("pwconv_bn_act", f"{name} pw_exp", (make(shape.channels, shape.middle), *expand))
    if shape.mid_kernel and fused is not False:
        yield Call("dwconv_pwconv", f"{name} dw_mid + pw_proj", (expanded, *mid, act, *project))
    if not shape.mid_kernel or fused is not True:
        if shape.mid_kernel:
            yield Call("dwconv_bn_act", f"{name} dw_mid", (expanded, *mid, act))
        yield Call("pwconv_bn_act", f"{name} pw_proj", (make(shape.hidden, shape.out), *project))


def uib_arguments(shape: UibShape, act: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """The arguments of the op `uib` for a block."""
    x = _nhwc(shape.batch, shape.channels, shape.height, shape.width, dtype=dtype, device=device)

    def depthwise(channels: int, kernel: int, stride: int) -> tuple[Any, ...]:
        if not kernel:
            return (None, None, None, [1, 1], [0] * 4, [1, 1])
        return _depthwise_arguments(channels, kernel, stride, dtype, device)

    def product(outputs: int, channels: int) -> tuple[Any, ...]:
        return (_nhwc(outputs, channels, 1, 1, dtype=dtype, device=device), *_affine(outputs, device))

    return (
        x, *depthwise(shape.channels, shape.start_kernel, shape.start_stride), *product(shape.hidden, shape.channels),
        *depthwise(shape.hidden, shape.mid_kernel, shape.mid_stride), act, *product(shape.outputs, shape.hidden),
        torch.rand(shape.outputs, device=device), shape.residual,
    )  # fmt: skip


def _conv_calls(name: str, shape: ConvShape, act: str, dtype: torch.dtype, device: str) -> Iterator[Call]:
    x = _nhwc(shape.batch, shape.channels, shape.height, shape.width, dtype=dtype, device=device)
    x = x.contiguous() if shape.image else x
    weight = _nhwc(shape.outputs, shape.channels, shape.kernel, shape.kernel, dtype=dtype, device=device)
    affine = _affine(shape.outputs, device)
    if shape.kernel == 1:
        size = (shape.batch, shape.outputs, shape.height, shape.width)
        residual = _nhwc(*size, dtype=dtype, device=device) if shape.residual else None
        yield Call("pwconv_bn_act", name, (x, weight, *affine, act, None, residual))
    else:
        pad = [shape.kernel // 2] * 4
        geometry = ([shape.stride, shape.stride], pad, [1, 1])
        yield Call("conv_bn_act", name, (x, weight, *affine, *geometry, act, True))


def _pair_calls(
    block: Block, shape: ConvPairShape, dtype: torch.dtype, device: str, fused: bool | None
) -> Iterator[Call]:
    def make(*size: int) -> torch.Tensor:
        return _nhwc(*size, dtype=dtype, device=device)

    x = make(shape.batch, shape.channels, shape.height, shape.width)
    geometry = ([shape.stride, shape.stride], [shape.kernel // 2] * 4, [1, 1], block.act)
    conv = (make(shape.hidden, shape.channels, shape.kernel, shape.kernel), *_affine(shape.hidden, device), *geometry)
    residual = make(shape.batch, shape.outputs, *shape.out) if shape.residual else None
    product = (make(shape.outputs, shape.hidden, 1, 1), *_affine(shape.outputs, device), block.second_act, None)
    if fused is not False:
        yield Call("conv_pwconv", block.name, (x, *conv, *product, residual))
    if fused is not True:
        yield Call("conv_bn_act", f"{block.name}, first", (x, *conv, True))
        h = make(shape.batch, shape.hidden, *shape.out)
        yield Call("pwconv_bn_act", f"{block.name}, second", (h, *product, residual))


def _attention_calls(
    name: str, shape: AttentionShape, dtype: torch.dtype, device: str, fused: bool | None
) -> Iterator[Call]:
    def make(*size: int) -> torch.Tensor:
        return _nhwc(*size, dtype=dtype, device=device)

    batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
    x = make(batch, channels, height, width)
    down = shape.stride > 1
    sets: list[Any] = []
    for depth in (shape.key_depth, shape.value_depth):
        weights = _depthwise_arguments(channels, 3, 2, dtype, device)[:3] if down else (None, None, None)
        sets += [*weights, make(depth, channels, 1, 1)]
    stride = [shape.stride, shape.stride]
    yield Call("kv_downsample", f"{name} key and value", (x, *sets, stride, [1, 1, 1, 1], [1, 1]))
    query = make(shape.heads * shape.key_depth, channels, 1, 1)
    positions = -(-height // shape.stride) * -(-width // shape.stride)
    # [N, P, D] as kv_downsample gives them
    key = make(batch, shape.key_depth, positions, 1)[..., 0].transpose(1, 2)
    value = make(batch, shape.value_depth, positions, 1)[..., 0].transpose(1, 2)
    output = make(channels, shape.heads * shape.value_depth, 1, 1)
    gamma = torch.rand(channels, device=device)
    last = (shape.heads, shape.key_depth**-0.5)
    if fused is not False:
        parts = (query, None, None, key, value, output, gamma, x)
        yield Call("mqa_projected", f"{name} query, attention, output", (x, *parts, *last))
    if fused is not True:
        yield Call("pwconv_bn_act", f"{name} query", (x, query, None, None, "none", None, None))
        q = make(batch, shape.heads * shape.key_depth, height, width)
        yield Call("mqa", f"{name} attention", (q, key, value, *last))
        mixed = make(batch, shape.heads * shape.value_depth, height, width)
        yield Call("pwconv_bn_act", f"{name} output", (mixed, output, None, None, "none", gamma, x))


def launches(call: Call) -> list[Launch]:
    """The launches of a call; needs Triton, runs nothing."""
    import importlib

    from mnv4_kernels.backends.cuda import KERNELS

    module = importlib.import_module(f"mnv4_kernels.ops.{KERNELS[call.op]}")
    found: list[Launch] = module.build(*call.arguments)[1]
    return found


def compiles_as(launch: Launch) -> tuple[Any, ...]:
    """What Triton specialises a launch on: launches that agree in it are one binary."""

    def kind(value: Any, specialised: bool) -> Any:
        if isinstance(value, int):
            return specialised and ("one" if value == 1 else value % 16 == 0)
        return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__

    specialised = (not parameter.do_not_specialize for parameter in launch.kernel.params)
    arguments = tuple(map(kind, launch.arguments, specialised))
    return (launch.kernel.__name__, arguments, *(tuple(sorted(d.items())) for d in (launch.constants, launch.options)))
