"""What a node of a graph computes, in one form however it was written: function, method or aten op."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional as F

from ..backends.torch_internals import OpOverload, pad_in_graphs

aten = torch.ops.aten


class OtherError(Exception):
    """No call that the engine has a node for."""


class Conv(NamedTuple):
    """A convolution in two dimensions."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]
    groups: int


class Linear(NamedTuple):
    """A fully connected layer."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


class Norm(NamedTuple):
    """A BatchNorm that uses its running statistics."""

    x: fx.Node
    mean: fx.Node
    var: fx.Node
    gamma: fx.Node | None
    beta: fx.Node | None
    eps: float


class Scale(NamedTuple):
    """A factor for each channel: a layer scale."""

    x: fx.Node
    factors: fx.Node  # [C]


class Act(NamedTuple):
    """One of the ops' activations."""

    x: fx.Node
    name: str


class Add(NamedTuple):
    """A sum of two tensors."""

    x: fx.Node
    other: fx.Node
    #: the result is written to `x`
    in_place: bool = False


class AveragePool(NamedTuple):
    """An average over windows."""

    x: fx.Node
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


class GlobalPool(NamedTuple):
    """The average over a whole map, [N, C, 1, 1] or, `flat`, [N, C]."""

    x: fx.Node
    flat: bool


class Pad(NamedTuple):
    """A frame of zeros, or of the reflected map."""

    x: fx.Node
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    reflect: bool


class Flatten(NamedTuple):
    """[N, C, 1, 1] -> [N, C]."""

    x: fx.Node


class Same(NamedTuple):
    """The identity: dropout in eval mode."""

    x: fx.Node


Call = Conv | Linear | Norm | Scale | Act | Add | AveragePool | GlobalPool | Pad | Flatten | Same


def value_of(node: fx.Node) -> Any:
    """What `node` gives, as a fake tensor or symbol; None where nobody noted it."""
    return node.meta.get("example_value", node.meta.get("val"))


def read(node: fx.Node) -> Call | None:
    """What `node` computes; None where it is nothing of the above."""
    table: dict[Any, Callable[..., Call]] = _METHODS if node.op == "call_method" else _FUNCTIONS
    parse = table.get(node.target) if node.op in ("call_function", "call_method") else None
    if parse is None:
        return None
    try:
        call = parse(*node.args, **node.kwargs)
    except (OtherError, TypeError):
        # arguments of another overload are none of the parser's
        return None
    return call if isinstance(call.x, fx.Node) else None


def may_write(node: fx.Node) -> bool:
    """True unless `node` surely changes none of its inputs."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return str(node.target).endswith("_") or "__setitem__" in str(node.target)
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    known = (getattr(node.target, "__module__", None) or "torch").split(".")[0] in ("torch", "_operator", "math")
    # F.relu(x, True), F.batch_norm(..., training=True), operator.iadd, torch.relu_
    flagged = any(value is True for value in (*node.args, *node.kwargs.values()))
    in_place = name.endswith("_") or (name.startswith("i") and getattr(operator, name, None) is node.target)
    return not known or flagged or in_place or name in ("setitem", "_set_grad_enabled", "_enter_autocast")


def _number(value: Any) -> float:
    # with dynamic=True every float is an input of the graph: asking what it is adds a guard
    known = value_of(value) if isinstance(value, fx.Node) else value
    if not isinstance(known, (int, float, torch.SymInt, torch.SymFloat)):
        raise OtherError
    return float(known)


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    if len(both) != 2 or not all(isinstance(item, int) for item in both):
        raise OtherError
    return both[0], both[1]


def _sides(padding: Any) -> tuple[int, int, int, int]:
    if isinstance(padding, str):
        if padding != "valid":
            raise OtherError
        padding = 0
    height, width = _pair(padding)
    return height, height, width, width


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> Conv:
    return Conv(input, weight, bias, _pair(stride), _sides(padding), _pair(dilation), groups)


def _linear(input: Any, weight: Any, bias: Any = None) -> Linear:
    return Linear(input, weight, bias)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Norm:
    if training or running_mean is None or running_var is None:
        raise OtherError
    return Norm(input, running_mean, running_var, weight, bias, _number(eps))


def _aten_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, enabled: Any
) -> Norm:
    return _batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _act(name: str) -> Callable[..., Act]:
    return lambda input, inplace=False: Act(input, name)


def _gelu(input: Any, approximate: str = "none") -> Act:
    return Act(input, {"none": "gelu", "tanh": "gelu_tanh"}[approximate])


def _hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Act:
    if (_number(min_val), _number(max_val)) != (0.0, 6.0):
        raise OtherError
    return Act(input, "relu6")


def _add(input: Any, other: Any, *, alpha: Any = 1, in_place: bool = False) -> Add:
    if alpha != 1 or not isinstance(other, fx.Node):
        raise OtherError
    return Add(input, other, in_place)


_add_ = functools.partial(_add, in_place=True)


def _mul(input: Any, other: Any) -> Scale:
    view = value_of(other) if isinstance(other, fx.Node) else None
    if view is None or other.target not in ("view", "reshape") or tuple(view.shape) != (1, view.numel(), 1, 1):
        raise OtherError
    factors = other.args[0]
    if value_of(factors) is None or value_of(factors).dim() != 1:
        raise OtherError
    return Scale(input, factors)


def _avg_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: Any = False,
    count_include_pad: Any = True,
    divisor_override: Any = None,
) -> AveragePool:
    sides = _sides(padding)
    if ceil_mode or divisor_override is not None or (any(sides) and not count_include_pad):
        raise OtherError
    return AveragePool(input, _pair(kernel_size), _pair(stride or kernel_size), sides)


def _adaptive_pool(input: Any, output_size: Any) -> GlobalPool:
    if _pair(output_size) != (1, 1):
        raise OtherError
    return GlobalPool(input, flat=False)


def _mean(input: Any, dim: Any, keepdim: Any = False) -> GlobalPool:
    if sorted(axis % 4 for axis in dim) != [2, 3]:
        raise OtherError
    return GlobalPool(input, flat=not keepdim)


def _flatten(input: Any, start_dim: Any = 0, end_dim: Any = -1) -> Flatten:
    if start_dim != 1 or end_dim not in (-1, 3):
        raise OtherError
    return Flatten(input)


def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Same:
    if training:
        raise OtherError
    return Same(input)


def _pad(input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Pad:
    sides = list(pad)
    if len(sides) != 4 or not all(isinstance(side, int) and side >= 0 for side in sides):
        raise OtherError
    if mode not in ("constant", "reflect") or value not in (None, 0):
        raise OtherError
    left, right, top, bottom = sides
    return Pad(input, (top, bottom, left, right), mode == "reflect")


_FUNCTIONS: dict[Any, Callable[..., Call]] = {
    **dict.fromkeys((torch.conv2d, aten.conv2d.default), _conv),
    **dict.fromkeys((F.linear, aten.linear.default), _linear),
    F.batch_norm: _batch_norm,
    aten.batch_norm.default: _aten_batch_norm,
    **dict.fromkeys((F.relu, torch.relu, aten.relu.default, aten.relu_.default), _act("relu")),
    F.relu6: _act("relu6"),
    **dict.fromkeys((F.hardtanh, aten.hardtanh.default, aten.hardtanh_.default), _hardtanh),
    **dict.fromkeys((F.hardswish, aten.hardswish.default, aten.hardswish_.default), _act("hard_swish")),
    **dict.fromkeys((F.silu, aten.silu.default, aten.silu_.default), _act("silu")),
    **dict.fromkeys((F.gelu, aten.gelu.default), _gelu),
    **dict.fromkeys((operator.add, torch.add, aten.add.Tensor), _add),
    **dict.fromkeys((operator.iadd, aten.add_.Tensor), _add_),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _mul),
    **dict.fromkeys((F.avg_pool2d, aten.avg_pool2d.default), _avg_pool),
    **dict.fromkeys((F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), _adaptive_pool),
    **dict.fromkeys((torch.mean, aten.mean.dim), _mean),
    **dict.fromkeys((torch.flatten, aten.flatten.using_ints), _flatten),
    F.dropout: _dropout,
    **dict.fromkeys((F.pad, pad_in_graphs, aten.pad.default), _pad),
}

_METHODS: dict[Any, Callable[..., Call]] = {
    **dict.fromkeys(("relu", "relu_"), _act("relu")),
    "add": _add,
    "add_": _add_,
    **dict.fromkeys(("mul", "mul_"), _mul),
    "mean": _mean,
    "flatten": _flatten,
}
