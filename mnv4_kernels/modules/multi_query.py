"""Multi-query attention as one step: norm, projections, down-sampled keys and values, layer scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from . import folding, leaves
from .steps import Call, Own, Step, empty_map, pointwise_call

#: where `tensors()` keeps what
_NORM = slice(0, 4)
_QUERY = slice(4, 6)
_KEY_DOWN = slice(6, 11)
_KEY = 11
_VALUE_DOWN = slice(12, 17)
_VALUE = 17
_OUTPUT = slice(18, 20)
_GAMMA = 20


@dataclasses.dataclass(frozen=True)
class MultiQuery:
    """The norm before attention, timm's MultiQueryAttention2d, and the layer scale after it."""

    name: str
    attention: nn.Module
    #: BatchNorm before the projections, None without
    norm: nn.Module | None = None
    layer_scale: nn.Module | None = None

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the step calls."""
        return ("pwconv_bn_act", "kv_downsample", "mqa")

    @property
    def takes_residual(self) -> bool:
        """The output projection adds it."""
        return True

    def path(self, name: str) -> dict[str, Any]:
        """The modules of attention's `query`, `key`, `value` or `output`."""
        return dict(getattr(self.attention, name)._modules)

    def modules(self) -> list[nn.Module]:
        """The modules that the ops stand in for."""
        owners = [self.norm, self.layer_scale, *self.attention.modules()]
        return [module for module in owners if module is not None]

    def tensors(self) -> list[torch.Tensor | None]:
        """Norm, query, key (depthwise, norm, projection), value likewise, output, gamma."""
        query, output = self.path("query")["proj"], self.path("output")["proj"]
        return [
            *_statistics(self.norm),
            query.weight,
            query.bias,
            *_down_tensors(self.path("key")),
            self.path("key")["proj"].weight,
            *_down_tensors(self.path("value")),
            self.path("value")["proj"].weight,
            output.weight,
            output.bias,
            gamma_of(self.layer_scale),
        ]

    @property
    def scale(self) -> float:
        """What the scores are multiplied with."""
        attention: Any = self.attention
        # scaled_dot_product_attention divides by the root of the key's size, whatever `scale` says
        return float(attention.key_dim**-0.5 if attention.fused_attn else attention.scale)

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""
        attention: Any = self.attention
        batch, _, height, width = x.shape
        heads = attention.num_heads
        if self.norm is not None:
            x = _batch_norm(x, self.norm, tensors[_NORM])
        query_weight, query_bias = tensors[_QUERY]
        output_weight, output_bias = tensors[_OUTPUT]
        assert query_weight is not None
        assert output_weight is not None
        query = F.conv2d(x, query_weight, query_bias).view(batch, heads, -1, height * width).transpose(2, 3)
        key = self._formula_of("key", x, tensors[_KEY_DOWN], tensors[_KEY])
        value = self._formula_of("value", x, tensors[_VALUE_DOWN], tensors[_VALUE])
        weights = torch.softmax(query @ key.transpose(2, 3) * self.scale, dim=-1)
        y = (weights @ value).transpose(2, 3).reshape(batch, -1, height, width)
        y = F.conv2d(y, output_weight, output_bias)
        gamma = tensors[_GAMMA]
        return y if gamma is None else y * gamma.view(1, -1, 1, 1)

    def _formula_of(
        self, name: str, x: torch.Tensor, down: Sequence[torch.Tensor | None], project: torch.Tensor | None
    ) -> torch.Tensor:
        assert project is not None
        modules = self.path(name)
        if "down_conv" in modules:
            conv = modules["down_conv"]
            top, bottom, left, right = leaves.padding_of(conv, x.shape[2], x.shape[3])
            assert down[0] is not None
            padded = F.pad(x, (left, right, top, bottom))
            x = F.conv2d(padded, down[0], None, conv.stride, 0, conv.dilation, conv.groups)
            x = _batch_norm(x, modules["norm"], down[1:])
        return F.conv2d(x, project).flatten(2).transpose(1, 2).unsqueeze(1)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""
        return empty_map(x, (x.shape[0], self.path("output")["proj"].out_channels, x.shape[2], x.shape[3]))

    def prepare(self) -> Call:
        """Reads the tensors; returns the folded and packed call."""
        attention: Any = self.attention
        heads, scale = attention.num_heads, self.scale
        query: nn.Conv2d = self.path("query")["proj"]
        keys, values = self.path("key"), self.path("value")
        norm = None if self.norm is None else folding.affine_of(self.norm)
        down = "down_conv" in keys
        project = _project(query, None if down else norm)
        finish = _finish(self.path("output")["proj"], gamma_of(self.layer_scale))
        normalise = None
        if norm is not None and down:
            # the shift doesn't fold past the depthwise convolution's zero padding: normalise first, exactly
            dtype = query.weight.dtype
            normalise = [value.to(dtype).view(1, -1, 1, 1) for value in norm]
        key = path_of(keys, None if down else norm)
        value = path_of(values, None if down else norm)
        packed = None if key.packed is None or value.packed is None else torch.cat([key.packed, value.packed])
        conv = keys.get("down_conv")
        stride, dilation = ([1, 1], [1, 1]) if conv is None else (list(conv.stride), list(conv.dilation))
        fixed = [0, 0, 0, 0] if conv is None else leaves.static_padding(conv)

        def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            source = x if normalise is None else torch.addcmul(normalise[1], x, normalise[0])
            size = fixed or leaves.same_padding(conv, x.shape[2], x.shape[3])  # type: ignore[arg-type]
            paths = ops.kv_downsample(source, *key.arguments, *value.arguments, stride, size, dilation, packed)
            return finish(ops.mqa(project(source), *paths, heads, scale), residual)

        return call


def attention_steps(
    name: str, attention: nn.Module, norm: nn.Module | None = None, layer_scale: nn.Module | None = None
) -> list[Step]:
    """One `MultiQuery` if the ops can stand in for the modules, else each of them as timm's own."""
    reasons = [*attention_reasons(attention), *leaves.norm_reasons(norm)]
    if norm is not None and not reasons:
        act = norm._modules.get("act")
        if act is not None and type(act) is not nn.Identity:
            reasons.append("an activation before attention")
    if layer_scale is not None and type(layer_scale) is nn.Identity:
        layer_scale = None
    if layer_scale is not None and type(layer_scale) not in leaves.LAYER_SCALES:
        reasons.append(f"{type(layer_scale).__name__} is no layer scale")
    if not reasons:
        return [MultiQuery(name, attention, norm, layer_scale)]
    reason = "; ".join(dict.fromkeys(reasons))
    parts = (("norm", norm), ("attn", attention), ("layer_scale", layer_scale))
    return [Own(part, module, reason) for part, module in parts if module is not None]


def attention_reasons(attention: Any) -> list[str]:
    """Why `attention` keeps timm's own path; empty list: the ops can stand in for it."""
    if type(attention) not in leaves.ATTENTIONS:
        return [f"{type(attention).__name__} is no multi-query attention"]
    reasons = [reason for reason in (leaves.tampered(attention),) if reason]
    if attention.has_query_strides:
        reasons.append(f"query strides {tuple(attention.query_strides)}")
    expected = {"query": ["proj"], "output": ["proj", "drop"]}
    for path in ("key", "value"):
        expected[path] = ["down_conv", "norm", "proj"] if "down_conv" in getattr(attention, path)._modules else ["proj"]
    for path, names in expected.items():
        modules = getattr(attention, path)._modules
        if list(modules) != names:
            reasons.append(f"`{path}` holds {', '.join(modules)}")
            continue
        reasons += _projection_reasons(path, modules)
    if not reasons and len(attention.key) != len(attention.value):
        reasons.append("key and value are down-sampled differently")
    return reasons


def _projection_reasons(path: str, modules: dict[str, Any]) -> list[str]:
    project = modules["proj"]
    reasons = leaves.conv_reasons(project)
    if not reasons and not leaves.is_pointwise(project):
        reasons.append(f"`{path}.proj` is no 1x1 convolution")
    if not reasons and path in ("key", "value") and project.bias is not None:
        reasons.append(f"`{path}.proj` has a bias")
    if "down_conv" in modules:
        down = modules["down_conv"]
        found = [*leaves.conv_reasons(down), *leaves.norm_reasons(modules["norm"])]
        if not found and not leaves.is_depthwise(down):
            found.append(f"`{path}.down_conv` is not depthwise")
        if not found and down.bias is not None:
            found.append(f"`{path}.down_conv` has a bias")
        if not found and type(modules["norm"]._modules.get("act", nn.Identity())) is not nn.Identity:
            found.append(f"`{path}.norm` has an activation")
        reasons += found
    if "drop" in modules and type(modules["drop"]) not in leaves.DROPS:
        reasons.append(f"`{path}.drop` is a {type(modules['drop']).__name__}")
    return reasons


def _statistics(norm: Any) -> list[torch.Tensor | None]:
    return [None] * 4 if norm is None else [norm.running_mean, norm.running_var, norm.weight, norm.bias]


def _down_tensors(modules: dict[str, Any]) -> list[torch.Tensor | None]:
    return [modules["down_conv"].weight, *_statistics(modules["norm"])] if "down_conv" in modules else [None] * 5


def _batch_norm(x: torch.Tensor, norm: Any, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    mean, variance, weight, bias = tensors
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)


def gamma_of(layer_scale: Any) -> torch.Tensor | None:
    """The layer scale's factors, None without."""
    return None if layer_scale is None else layer_scale.gamma


Affine = tuple[torch.Tensor, torch.Tensor]


class _Down(NamedTuple):
    """One path's part of `kv_downsample`: depthwise weight, scale, shift, projection; all of it packed."""

    arguments: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor]
    packed: torch.Tensor | None


def path_of(modules: dict[str, Any], norm: Affine | None) -> _Down:
    """A path's arguments of `kv_downsample`; `norm` is folded into them, where nothing down-samples."""
    project = modules["proj"].weight.detach()
    packed = [folding.pack(project.double(), None, False)]
    down = None
    if "down_conv" in modules:
        down = modules["down_conv"].weight.detach()
        norm = folding.affine_of(modules["norm"])
        packed.insert(0, folding.pack(down.double(), norm[0], True))
    scale, shift = (None, None) if norm is None else (norm[0].float(), norm[1].float())
    parts = [part for part in packed if part is not None]
    return _Down((down, scale, shift, project), torch.cat(parts) if parts else None)


def projection_of(conv: nn.Conv2d, norm: Affine | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, shift) of the query projection in float64, with the norm before it folded in."""
    weight = conv.weight.detach().double()
    shift = None if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        moved = weight.flatten(1) @ norm[1]
        shift = moved if shift is None else shift + moved
        weight = weight * norm[0].view(1, -1, 1, 1)
    return weight, shift


def _project(conv: nn.Conv2d, norm: Affine | None) -> Call:
    weight, shift = projection_of(conv, norm)
    return pointwise_call(weight, None, shift, "none", conv.weight.dtype)


def _finish(conv: nn.Conv2d, gamma: torch.Tensor | None) -> Call:
    """The output projection, with the layer scale folded in."""
    scale, shift = folding.epilogue_of(conv, None, gamma)
    return pointwise_call(conv.weight.detach().double(), scale, shift, "none", conv.weight.dtype)
