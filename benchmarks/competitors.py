"""Every way of computing an op's call: eager, eager in channels_last, torch.compile, oneDNN's fused calls, SDPA, ours.

All get what a user who cares for speed would have: normalisation folded into the weights, weights in the order in which
the library reads them, activations in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from mnv4_kernels import functional, ops
from mnv4_kernels.testing import Case, exact, outputs

Tensors = tuple[torch.Tensor, ...]
Call = Callable[[], torch.Tensor | Tensors]
Layer = Callable[[torch.Tensor], torch.Tensor]

#: What the calls of timm's models need; in place, as timm's are.
ACTIVATIONS: dict[str, Layer] = {"none": lambda x: x, "relu": torch.relu_, "gelu": F.gelu}

#: Largest error relative to the largest exact value with which a competitor is still timed. In bfloat16 eager rounds
#: the folded weights and what lies between two layers; ours round less, and their own tests hold them to less.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class WrongError(AssertionError):
    """A competitor computes something else; its time would mean nothing."""


def check(case: Case, arguments: tuple[Any, ...], call: Call) -> float:
    """The largest error of `call` relative to float64; raises `WrongError` above the gate."""
    errors: list[float] = []
    gate = GATES[arguments[0].dtype]
    for got, wanted in zip(outputs(call()), exact(case.op, arguments), strict=True):
        if got.shape != wanted.shape:
            raise WrongError(f"{case}: got shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        # not `>`: NaN is wrong too
        if not error <= gate:
            raise WrongError(f"{case}: relative error {error:.1e} is above {gate:.1e}")
        errors.append(error)
    return max(errors)


class Eager:
    """Layers of plain torch."""

    def convolution(
        self,
        x: torch.Size,
        weight: torch.Tensor,  # [K, C / groups, kh, kw]
        bias: torch.Tensor | None,  # [K]
        stride: list[int],
        padding: list[int],
        groups: int,
        act: str,
    ) -> Layer:
        """act(conv2d + bias) of maps of shape `x`."""
        activate = ACTIVATIONS[act]
        return lambda x: activate(F.conv2d(x, weight, bias, stride, padding, 1, groups))

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """The fully connected layer [K, C]."""
        return lambda x: F.linear(x, weight, bias)


class OneDnn(Eager):
    """The calls that inductor makes of a frozen model: weights reordered beforehand, the activation in the product."""

    def convolution(
        self,
        x: torch.Size,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        groups: int,
        act: str,
    ) -> Layer:
        """As `Eager.convolution`."""
        library = torch.ops.mkldnn
        packed = library._reorder_convolution_weight(weight, padding, stride, [1, 1], groups, list(x))
        options = (bias, padding, stride, [1, 1], groups, act, [], "none" if act == "gelu" else "")
        return lambda x: library._convolution_pointwise(x, packed, *options)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """As `Eager.linear`."""
        library = torch.ops.mkldnn
        packed = library._reorder_linear_weight(weight)
        return lambda x: library._linear_pointwise(x, packed, bias, "none", [], "")


def _folded(
    weight: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if scale is not None:
        weight = (weight.double() * scale.double().view(-1, 1, 1, 1)).to(weight.dtype)
    layout = torch.channels_last if weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return weight.contiguous(memory_format=layout), None if shift is None else shift.to(weight.dtype)


def _convolution(layers: Eager, arguments: tuple[Any, ...]) -> Layer:
    x, weight, scale, shift, stride, sides, _, act, *_ = arguments
    groups = x.shape[1] // weight.shape[1]
    return layers.convolution(x.shape, *_folded(weight, scale, shift), stride, sides[::2], groups, act)


def _pointwise(layers: Eager, arguments: tuple[Any, ...]) -> Layer:
    x, weight, scale, shift, act, *_ = arguments
    return layers.convolution(x.shape, *_folded(weight, scale, shift), [1, 1], [0, 0], 1, act)


def _kv_downsample(layers: Eager, arguments: tuple[Any, ...]) -> Callable[[torch.Tensor], Tensors]:
    x, *operands, stride, sides, _ = arguments
    paths: list[tuple[Layer, Layer]] = []
    for down, scale, shift, project in (operands[:4], operands[4:]):
        first = layers.convolution(
            x.shape, *_folded(down, scale, shift), stride, sides[::2], groups=x.shape[1], act="none"
        )
        second = layers.convolution(first(x).shape, project, None, [1, 1], [0, 0], groups=1, act="none")
        paths.append((first, second))

    def run(x: torch.Tensor) -> Tensors:
        # a position's vector is contiguous, as attention reads it
        return tuple(second(first(x)).flatten(2).transpose(1, 2).contiguous() for first, second in paths)

    return run


def _head(layers: Eager, arguments: tuple[Any, ...]) -> Layer:
    x, weight, scale, shift, act, classifier, bias, *_ = arguments
    pooled = torch.Size((*x.shape[:2], 1, 1))
    expand = layers.convolution(pooled, *_folded(weight, scale, shift), [1, 1], [0, 0], 1, act)
    classify = layers.linear(classifier, bias)
    return lambda x: classify(expand(x.mean((2, 3), keepdim=True)).flatten(1))


def _mqa(layers: Eager, arguments: tuple[Any, ...], enable_gqa: bool = False) -> Layer:
    _, key, value, heads, scale = arguments

    def run(query: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = query.shape
        q = query.reshape(batch, heads, key.shape[2], -1).transpose(-1, -2).contiguous()
        y = F.scaled_dot_product_attention(q, key[:, None], value[:, None], scale=scale, enable_gqa=enable_gqa)
        return y.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    return run


_FORMULAS: dict[str, Callable[[Eager, tuple[Any, ...]], Callable[[torch.Tensor], torch.Tensor | Tensors]]] = {
    "dwconv_bn_act": _convolution,
    "pwconv_bn_act": _pointwise,
    "conv_bn_act": _convolution,
    "kv_downsample": _kv_downsample,
    "mqa": _mqa,
    "head": _head,
}


def _formula(case: Case, arguments: tuple[Any, ...], layers: Eager) -> Call:
    run, x = _FORMULAS[case.op](layers, arguments), arguments[0]
    return lambda: run(x)


def _eager(case: Case, arguments: tuple[Any, ...]) -> Call:
    return _formula(case, arguments, Eager())


def _onednn(case: Case, arguments: tuple[Any, ...]) -> Call:
    return _formula(case, arguments, OneDnn())


def _compiled(case: Case, arguments: tuple[Any, ...]) -> Call:
    # one call's graph must not be generalised to the next call's shape
    torch.compiler.reset()
    compiled, x = torch.compile(_FORMULAS[case.op](Eager(), arguments), fullgraph=True, dynamic=False), arguments[0]
    return lambda: compiled(x)


def _enable_gqa(case: Case, arguments: tuple[Any, ...]) -> Call:
    run, x = _mqa(Eager(), arguments, enable_gqa=True), arguments[0]
    return lambda: run(x)


def _ours(case: Case, arguments: tuple[Any, ...]) -> Call:
    packed = PACKED[case.op](arguments)
    op = getattr(ops, case.op)
    return lambda: op(*arguments, *packed)


def _pack_paths(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    _, *operands, _, _, _ = arguments
    parts = [
        part
        for down, scale, _, project in (operands[:4], operands[4:])
        for part in (functional.prepack(down, scale, depthwise=True), functional.prepack(project))
    ]
    return (torch.cat(parts),)


#: The packed weights that follow an op's arguments, as patched models pass them.
PACKED: dict[str, Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]]] = {
    "dwconv_bn_act": lambda a: (functional.prepack(a[1], a[2], depthwise=True),),
    "pwconv_bn_act": lambda a: (functional.prepack(a[1], a[2]),),
    "conv_bn_act": lambda a: (functional.prepack(a[1], a[2]),),
    "kv_downsample": _pack_paths,
    "mqa": lambda a: (),
    "head": lambda a: (functional.prepack(a[1], a[2]), functional.prepack(a[5][:, :, None, None])),
}

OURS = "ours"

#: Name -> memory format of the activations and what makes the call; in the order of the tables.
COMPETITORS: dict[str, tuple[str, Callable[[Case, tuple[Any, ...]], Call]]] = {
    "eager": ("contiguous", _eager),
    "channels_last": ("channels_last", _eager),
    "compile": ("channels_last", _compiled),
    "onednn": ("channels_last", _onednn),
    "enable_gqa": ("channels_last", _enable_gqa),
    OURS: ("channels_last", _ours),
}


def competitors_of(op: str) -> list[str]:
    """Who computes `op`: fused attention is not oneDNN's, and nothing else has `enable_gqa`."""
    absent = "onednn" if op == "mqa" else "enable_gqa"
    return [name for name in COMPETITORS if name != absent]


def missing(competitor: str, dtype: torch.dtype) -> str:
    """Why `competitor` can't compute in `dtype` on this processor; empty where it can."""
    if competitor == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN's fused calls want AVX-512 for bfloat16, which this processor does not have"
    return ""


def prepare(case: Case, dtype: torch.dtype, competitor: str) -> tuple[Call, float]:
    """`competitor`'s call of `case`, and its error, checked.

    Raises:
        WrongError: the result is further from float64's than `GATES` allows.
    """
    layout, build = COMPETITORS[competitor]
    arguments = case.arguments(dtype, layout, weight_layout=layout)
    call = build(case, arguments)
    return call, check(case, arguments, call)
