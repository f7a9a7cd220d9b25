"""Bodies of timm's convolutional blocks, and their drop-in forwards.

A body is read off the instance by attribute, so that it follows whatever the user did to
it; what no op can stand in for keeps timm's module and says why.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import leaves
from .body import Body
from .dropin import BlockForward
from .steps import Convolution, Own, Step, convolution, optional

ANTI_ALIASING = "anti-aliasing pool: no op computes it; on a CPU the program of a whole network does"
SQUEEZE_EXCITE = "squeeze-and-excitation: no op computes it"


def conv_norm_act_steps(name: str, block: nn.Module) -> list[Step]:
    """Steps of a ConvNormAct: `conv`, `bn`, `aa`."""
    modules: dict[str, Any] = dict(block._modules)
    norm = modules.get("bn")
    steps = convolution(name, modules["conv"], None if _is_empty(norm) else norm)
    return [*steps, *optional(f"{name}.aa" if name else "aa", modules.get("aa"), ANTI_ALIASING)]


def _child_steps(name: str, child: nn.Module) -> list[Step]:
    if type(child) in leaves.CONV_NORM_ACTS and not leaves.tampered(child):
        return conv_norm_act_steps(name, child)
    reason = leaves.tampered(child) or f"{type(child).__name__} is no ConvNormAct"
    return optional(name, child, reason)


def with_layer_scale(steps: list[Step], layer_scale: nn.Module | None) -> list[Step]:
    """The last step with the layer scale folded in, where it can be."""
    if layer_scale is None or type(layer_scale) is nn.Identity:
        return steps
    if type(layer_scale) not in leaves.LAYER_SCALES:
        return [*steps, *optional("layer_scale", layer_scale, f"{type(layer_scale).__name__} is no layer scale")]
    last = steps[-1]
    if isinstance(last, Convolution) and last.act_name == "none":
        scaled = Convolution(last.name, last.conv, last.norm, last.act, layer_scale, last.channels_last)
        return [*steps[:-1], scaled]
    return [*steps, *optional("layer_scale", layer_scale, "nothing before it to fold it into")]


def drop_steps(name: str, drop: nn.Module | None) -> list[Step]:
    """Nothing for what does nothing in eval mode, else timm's module."""
    if drop is None or type(drop) in leaves.DROPS:
        return []
    return [Own(name, drop, f"{type(drop).__name__} is no dropout that the ops know")]


class ConvNormActForward(BlockForward):
    """Drop-in forward of timm's ConvNormAct."""

    def _mnv4_body(self, key: str) -> Body:
        return Body(self, conv_norm_act_steps("", self))


class ConvBnActForward(BlockForward):
    """Drop-in forward of the `cn` block: convolution, norm + act, and perhaps a skip."""

    def _mnv4_body(self, key: str) -> Body:
        modules: dict[str, Any] = dict(self._modules)
        steps = [
            *convolution("conv", modules["conv"], modules["bn1"]),
            *optional("aa", modules.get("aa"), ANTI_ALIASING),
            *skip_drop_steps(self),
        ]
        return Body(self, steps, residual=has_skip(self), drop_path=drop_path_of(self), settings=[(self, ["has_skip"])])


class EdgeResidualForward(BlockForward):
    """Drop-in forward of EdgeResidual: dense kxk expansion, 1x1 projection."""

    def _mnv4_body(self, key: str) -> Body:
        modules: dict[str, Any] = dict(self._modules)
        steps = [
            *convolution("conv_exp", modules["conv_exp"], modules["bn1"]),
            *optional("aa", modules.get("aa"), ANTI_ALIASING),
            *optional("se", modules.get("se"), SQUEEZE_EXCITE),
            *convolution("conv_pwl", modules["conv_pwl"], modules["bn2"]),
            *skip_drop_steps(self),
        ]
        return Body(self, steps, residual=has_skip(self), drop_path=drop_path_of(self), settings=[(self, ["has_skip"])])


class UniversalInvertedResidualForward(BlockForward):
    """Drop-in forward of the universal inverted bottleneck, in all its shapes.

    ExtraDW (dw_start and dw_mid), IB (dw_mid), ConvNeXt-like (dw_start), FFN (neither),
    with or without dw_end, layer scale and skip.
    """

    def _mnv4_body(self, key: str) -> Body:
        modules: dict[str, Any] = dict(self._modules)
        steps: list[Step] = []
        for name in ("dw_start", "pw_exp", "dw_mid"):
            steps += _child_steps(name, modules[name])
        steps += optional("se", modules.get("se"), SQUEEZE_EXCITE)
        for name in ("pw_proj", "dw_end"):
            steps += _child_steps(name, modules[name])
        steps = [*with_layer_scale(steps, modules.get("layer_scale")), *skip_drop_steps(self)]
        return Body(self, steps, residual=has_skip(self), drop_path=drop_path_of(self), settings=[(self, ["has_skip"])])


def skip_drop_steps(block: nn.Module) -> list[Step]:
    """Steps of the stochastic depth before a block's skip: in eval mode normally none."""
    return drop_steps("drop_path", block._modules.get("drop_path")) if has_skip(block) else []


def drop_path_of(block: nn.Module) -> nn.Module | None:
    """The stochastic depth before a block's skip, None where there is none."""
    drop = block._modules.get("drop_path") if has_skip(block) else None
    return None if drop is None or type(drop) is nn.Identity else drop


def has_skip(block: Any) -> bool:
    """True where a block adds its input to its result."""
    return bool(block.has_skip)


def _is_empty(norm: nn.Module | None) -> bool:
    return type(norm) is nn.Sequential and len(norm) == 0
