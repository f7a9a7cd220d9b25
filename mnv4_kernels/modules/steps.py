"""Steps: a block taken apart into what one op computes, and what timm's own modules compute.

A `Convolution` says which modules one op stands in for; `prepare` reads their tensors and
returns the ready call, with everything folded and packed. `formula` is the same
mathematics over explicit tensors in plain torch, for the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops.activation import apply as apply_act
from ..ops.layout import memory_format_of
from . import folding, leaves

#: a ready call: (x [N, C, H, W], residual or None) -> y
Call = Callable[..., torch.Tensor]

#: several in a row: x -> y
Run = Callable[[torch.Tensor], torch.Tensor]


class Fused(Protocol):
    """A piece that ops compute, standing in for timm's modules."""

    @property
    def name(self) -> str:
        """The piece's name in reports."""

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the step calls."""

    @property
    def takes_residual(self) -> bool:
        """True where the call takes a residual to add."""

    def modules(self) -> list[nn.Module]:
        """The modules that the ops stand in for."""

    def tensors(self) -> list[torch.Tensor | None]:
        """What `formula` takes."""

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""

    def prepare(self) -> Call:
        """Reads the tensors; returns the folded and packed call."""


@dataclasses.dataclass(frozen=True)
class Own:
    """A piece that keeps timm's own module, and why."""

    name: str
    module: nn.Module
    reason: str


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Convolution, BatchNorm, activation and layer scale, in one op."""

    name: str
    conv: nn.Conv2d
    norm: nn.Module | None = None
    act: nn.Module | None = None
    #: multiplies the result; only where there is no activation
    layer_scale: nn.Module | None = None
    #: NHWC whatever the input's format is (the stem reads images)
    channels_last: bool = False

    @property
    def op(self) -> str:
        """The op that computes this step."""
        return leaves.op_of(self.conv)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the step calls."""
        return (self.op,)

    @property
    def act_name(self) -> str:
        """The op's name of the activation."""
        return leaves.act_name(self.act)

    @property
    def takes_residual(self) -> bool:
        """True where the op adds a residual in its epilogue."""
        return self.op == "pwconv_bn_act"

    def modules(self) -> list[nn.Module]:
        """The modules that the op stands in for."""
        owners = [self.conv, self.norm, self.act, self.layer_scale]
        if self.norm is not None:
            owners += self.norm.children()
        return [module for module in dict.fromkeys(owners) if module is not None]

    def tensors(self) -> list[torch.Tensor | None]:
        """What `formula` takes: weight, bias, mean, variance, affine weight and bias, gamma."""
        norm = self.norm
        statistics = [None] * 4 if norm is None else [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        gamma = None if self.layer_scale is None else self.layer_scale.gamma
        return [self.conv.weight, self.conv.bias, *statistics, gamma]

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""
        weight, bias, mean, variance, affine_weight, affine_bias, gamma = tensors
        assert weight is not None
        conv = self.conv
        top, bottom, left, right = leaves.padding_of(conv, x.shape[2], x.shape[3])
        if top == bottom and left == right:
            y = F.conv2d(x, weight, bias, conv.stride, (top, left), conv.dilation, conv.groups)
        else:
            padded = F.pad(x, (left, right, top, bottom))
            y = F.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
        if mean is not None:
            y = F.batch_norm(y, mean, variance, affine_weight, affine_bias, False, 0.0, self.norm.eps)  # type: ignore
        y = apply_act(self.act_name, y)
        return y if gamma is None else y * gamma.view(1, -1, 1, 1)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""
        size = (x.shape[0], self.conv.out_channels, *leaves.output_size(self.conv, x.shape[2], x.shape[3]))
        return empty_map(x, size, self.channels_last)

    def prepare(self) -> Call:
        """Reads the tensors; returns the folded and packed call."""
        conv = self.conv
        gamma = None if self.layer_scale is None else self.layer_scale.gamma
        scale, shift = folding.epilogue_of(conv, self.norm, gamma)  # type: ignore[arg-type]
        weight = conv.weight.detach().double()
        if self.op == "pwconv_bn_act":
            return pointwise_call(weight, scale, shift, self.act_name, conv.weight.dtype)
        return _spatial_call(self, folding.operands(weight, scale, shift, conv.weight.dtype, self.op))


def empty_map(x: torch.Tensor, size: Sequence[Any], channels_last: bool = False) -> torch.Tensor:
    """An uninitialised map of `size` in the memory format of an op's result on `x`."""
    format_ = torch.channels_last if channels_last else memory_format_of(x)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=format_)


def pointwise_call(
    weight: torch.Tensor,  # [K, C, 1, 1], float64
    scale: torch.Tensor | None,  # [K], float64
    shift: torch.Tensor | None,  # [K], float64
    act: str,
    dtype: torch.dtype,
) -> Call:
    """A ready 1x1 convolution of activations in `dtype`."""
    op = ops.pwconv_bn_act
    operands = folding.operands(weight, scale, shift, dtype, "pwconv_bn_act")
    first, packed = (operands.weight, operands.scale, operands.shift, act, None), operands.packed

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return op(x, *first, residual, packed)

    return call


def _spatial_call(step: Convolution, operands: folding.Operands) -> Call:
    conv, depthwise = step.conv, step.op == "dwconv_bn_act"
    op: Any = ops.dwconv_bn_act if depthwise else ops.conv_bn_act
    first = (operands.weight, operands.scale, operands.shift, list(conv.stride))
    dilation, packed = list(conv.dilation), operands.packed
    tail = (dilation, step.act_name, packed) if depthwise else (dilation, step.act_name, step.channels_last, packed)
    padding = leaves.static_padding(conv)
    if padding is not None:
        fixed = (*first, padding, *tail)

        def call(x: torch.Tensor) -> torch.Tensor:
            return op(x, *fixed)

        return call

    def padded_call(x: torch.Tensor) -> torch.Tensor:
        return op(x, *first, leaves.same_padding(conv, x.shape[2], x.shape[3]), *tail)

    return padded_call


def chained(calls: Sequence[Call], residual: bool, last_takes_residual: bool) -> Run:
    """One function that makes `calls` in order; where `residual`, the input is added, by the last call if it can."""
    if residual and last_takes_residual:
        *first, finish = calls

        def run_into_skip(x: torch.Tensor) -> torch.Tensor:
            y = x
            for call in first:
                y = call(y)
            return finish(y, x)

        return run_into_skip

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x
        for call in calls:
            y = call(y)
        return y + x if residual else y

    return run


Step = Fused | Own


def convolution(
    name: str,
    conv: nn.Module,
    norm: nn.Module | None,
    act: nn.Module | None = None,
    *,
    channels_last: bool = False,
) -> list[Step]:
    """One `Convolution` if an op can stand in for the modules, else each of them as timm's own."""
    reasons = [*leaves.conv_reasons(conv), *leaves.norm_reasons(norm), *leaves.act_reasons(act)]
    # a norm's own activation runs inside of it, where timm's modules run
    parts = [module for module in (conv, norm, act) if module is not None]
    if norm is not None and type(norm) in leaves.NORMS:
        inner = norm._modules.get("act")
        reasons += leaves.act_reasons(inner)
        if inner is not None and type(inner) is not nn.Identity:
            if act is not None:
                reasons.append("two activations in a row")
            act = inner
    if not reasons:
        assert isinstance(conv, nn.Conv2d)
        return [Convolution(name, conv, norm, act, channels_last=channels_last)]
    reason = "; ".join(dict.fromkeys(reasons))
    return [Own(name, module, reason) for module in parts]


def optional(name: str, module: nn.Module | None, reason: str) -> list[Step]:
    """Nothing for None, nn.Identity and an empty Sequential, else the module as timm's own."""
    idle = module is None or type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0)
    return [] if idle else [Own(name, module, reason)]  # type: ignore[arg-type]
