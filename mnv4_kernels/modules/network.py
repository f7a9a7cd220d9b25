"""Drop-in forwards of timm's MobileNetV3, the network class of MobileNet-V4.

The stem reads the image as it comes and writes NHWC, the blocks keep it, the head reads
it: no conversions inside. What leaves the network before the head is handed out in the
memory format that timm would give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .dropin import DropIn
from .head import head_steps
from .plan import Body
from .section import Section, sections
from .steps import Own, Step, convolution

STEM = "stem"
HEAD = "head"
PRE_LOGITS = "pre_logits"
WHOLE = "whole"


def stem_body(network: nn.Module) -> Body:
    """`conv_stem`, `bn1` and, in feature extractors, `act1`."""
    modules: dict[str, Any] = dict(network._modules)
    conv, norm, act = modules["conv_stem"], modules["bn1"], modules.get("act1")
    steps = convolution(STEM, conv, norm, act, channels_last=True)
    return Body(network, steps, bypassed=_with_children(conv, norm, act))


def head_body(network: nn.Module, classifier: bool) -> Body:
    """Pool, `conv_head`, `norm_head`, `act2`, flatten, and the classifier or not."""
    modules: dict[str, Any] = dict(network._modules)
    expand = convolution("conv_head", modules["conv_head"], _not_idle(modules["norm_head"]), _not_idle(modules["act2"]))
    last = modules["classifier"] if classifier else None
    steps = head_steps(modules["global_pool"], expand, modules["flatten"], last)
    names = ["global_pool", "conv_head", "norm_head", "act2", "flatten", *(["classifier"] if classifier else [])]
    settings = [(modules["global_pool"], ["pool_type"])] if hasattr(modules["global_pool"], "pool_type") else []
    return Body(network, steps, bypassed=_with_children(*(modules[name] for name in names)), settings=settings)


def whole_body(network: nn.Module) -> Body:
    """Stem, blocks and head, if ops compute all of them; else nothing."""
    stem, head = stem_body(network), head_body(network, classifier=True)
    inner: Any = sections("blocks", network._modules["blocks"])  # type: ignore[arg-type]
    steps: list[Step] = [*stem.steps, *inner, *head.steps]
    own = [step for step in steps if isinstance(step, Own)]
    bodies = [stem, head, *(step.body for step in inner if isinstance(step, Section))]
    settings = [setting for body in bodies for setting in body.settings]
    bypassed = [module for module in network.modules() if module is not network]
    return Body(network, own or steps, bypassed=bypassed, settings=settings)


class _Network(DropIn):
    """What the network classes share: the stem."""

    def _mnv4_stem(self, x: torch.Tensor) -> torch.Tensor:
        """The stem's result in NHWC, by the op or by timm's modules."""
        y = self._mnv4_run(x, STEM)
        if y is not None:
            return y
        modules: dict[str, Any] = dict(self._modules)
        y = modules["bn1"](modules["conv_stem"](x))
        if "act1" in modules:
            y = modules["act1"](y)
        return y.contiguous(memory_format=torch.channels_last)

    def _mnv4_whole(self, x: Any) -> bool:
        """True where the network's own forwards here may run: eval mode on a plain CPU tensor."""
        return not self._mnv4_obstacle(x) and not self.grad_checkpointing

    def _mnv4_like_timm(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`y` in the memory format in which timm hands out the features of `x`."""
        conv: Any = self._modules["conv_stem"]
        nhwc = torch.channels_last in (_memory_format(x), _memory_format(conv.weight))
        return y.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


class MobileNetV3Forward(_Network):
    """Drop-in forwards of MobileNetV3: the classifier, and the trunk with its taps."""

    def _mnv4_body(self, key: str) -> Body:
        if key == STEM:
            return stem_body(self)
        if key in (HEAD, PRE_LOGITS):
            return head_body(self, classifier=key == HEAD)
        return whole_body(self)

    def _mnv4_features(self, x: torch.Tensor) -> torch.Tensor:
        blocks: Any = self._modules["blocks"]
        return blocks(self._mnv4_stem(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] -> logits [N, K]."""
        if not self._mnv4_whole(x):
            return super().forward(x)
        # with gradients, recomputing block by block needs less memory than the network at once
        y = None if torch.is_grad_enabled() else self._mnv4_run(x, WHOLE)
        return self.forward_head(self._mnv4_features(x)) if y is None else y

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] -> the last stage's map."""
        if not self._mnv4_whole(x):
            timm: Any = super()
            return timm.forward_features(x)
        return self._mnv4_like_timm(self._mnv4_features(x), x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last stage's map -> logits [N, K], or the features before the classifier."""
        y = self._mnv4_run(x, PRE_LOGITS if pre_logits else HEAD)
        timm: Any = super()
        return timm.forward_head(x, pre_logits) if y is None else y

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's `forward_intermediates`, run in NHWC; its signature is timm's."""
        timm: Any = super()
        if not self._mnv4_whole(x):
            return timm.forward_intermediates(x, *args, **kwargs)
        found = timm.forward_intermediates(x.contiguous(memory_format=torch.channels_last), *args, **kwargs)
        if isinstance(found, tuple):
            last, taps = found
            return self._mnv4_like_timm(last, x), [self._mnv4_like_timm(tap, x) for tap in taps]
        return [self._mnv4_like_timm(tap, x) for tap in found]


class MobileNetV3FeaturesForward(_Network):
    """Drop-in forward of MobileNetV3Features, what `features_only=True` gives."""

    def _mnv4_body(self, key: str) -> Body:
        return stem_body(self)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, C, H, W] -> one map for each tap."""
        if not self._mnv4_whole(x):
            return super().forward(x)
        y = self._mnv4_stem(x)
        blocks: Any = self._modules["blocks"]
        hooks: Any = self.feature_hooks
        if hooks is not None:
            blocks(y)
            return [self._mnv4_like_timm(tap, x) for tap in hooks.get_output(y.device).values()]
        taps: Any = self._stage_out_idx
        found = [y] if 0 in taps else []
        for index, block in enumerate(blocks, start=1):
            y = block(y)
            if index in taps:
                found.append(y)
        return [self._mnv4_like_timm(tap, x) for tap in found]


def _with_children(*modules: nn.Module | None) -> list[nn.Module]:
    return [child for module in modules if module is not None for child in module.modules()]


def _not_idle(module: nn.Module) -> nn.Module | None:
    return None if type(module) is nn.Identity else module


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    # torch's rule for convolutions: strides decide, also where sizes of one make both formats true
    return torch._prims_common.suggest_memory_format(x)
