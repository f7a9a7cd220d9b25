"""Global average pool, 1x1 convolution, norm, activation and classifier as one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from . import folding, leaves
from .steps import Call, Convolution, Own, Step


@dataclasses.dataclass(frozen=True)
class Head:
    """[N, C, H, W] -> logits [N, K], or features [N, F] without a classifier."""

    name: str
    pool: nn.Module
    #: the 1x1 convolution with its norm and activation
    expand: Convolution
    classifier: nn.Linear | None

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that the step calls."""
        return ("head",)

    @property
    def takes_residual(self) -> bool:
        """A head has no skip."""
        return False

    def modules(self) -> list[nn.Module]:
        """The modules that the op stands in for."""
        owners = [*self.pool.modules(), *self.expand.modules(), self.classifier]
        return [module for module in owners if module is not None]

    def tensors(self) -> list[torch.Tensor | None]:
        """Those of the convolution, then the classifier's weight and bias."""
        classifier = self.classifier
        last = [None, None] if classifier is None else [classifier.weight, classifier.bias]
        return [*self.expand.tensors(), *last]

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""
        *expand, weight, bias = tensors
        y = self.expand.formula(F.adaptive_avg_pool2d(x, 1), expand).flatten(1)
        return y if weight is None else F.linear(y, weight, bias)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""
        width = self.expand.conv.out_channels if self.classifier is None else self.classifier.out_features
        return x.new_empty(x.shape[0], width)

    def prepare(self) -> Call:
        """Reads the tensors; returns the folded and packed call."""
        conv, classifier = self.expand.conv, self.classifier
        scale, shift = folding.epilogue_of(conv, self.expand.norm, None)
        dtype = conv.weight.dtype
        folded = folding.operands(conv.weight.detach().double(), scale, shift, dtype, "head")
        arguments = (folded.weight, folded.scale, folded.shift, self.expand.act_name)
        weight = bias = packed = None
        if classifier is not None:
            weight = classifier.weight.detach()
            bias = None if classifier.bias is None else classifier.bias.detach()
            packed = folding.pack(weight.double(), None, False)
        op, last = ops.head, (weight, bias, folded.packed, packed)

        def call(x: torch.Tensor) -> torch.Tensor:
            return op(x, *arguments, *last)

        return call


def head_steps(pool: Any, expand: list[Step], flatten: nn.Module, classifier: nn.Module | None) -> list[Step]:
    """One `Head` if the op can stand in for the modules, else each of them as timm's own.

    Args:
        pool: timm's SelectAdaptivePool2d.
        expand: the steps of the 1x1 convolution with its norm and activation.
        flatten: nn.Flatten(1), or nn.Identity for a head that keeps the map.
        classifier: None to stop before it.
    """
    reasons = [*leaves.pool_reasons(pool), *(step.reason for step in expand if isinstance(step, Own))]
    if type(flatten) is not nn.Flatten or flatten.start_dim != 1 or flatten.end_dim != -1:
        reasons.append(f"{type(flatten).__name__} after the pool keeps the map")
    if classifier is not None and type(classifier) is nn.Identity:
        classifier = None
    if classifier is not None and type(classifier) not in leaves.LINEARS:
        reasons.append(f"{type(classifier).__name__} is no fully connected layer")
    if classifier is not None and leaves.tampered(classifier):
        reasons.append(leaves.tampered(classifier))
    first = expand[0] if len(expand) == 1 else None
    if not reasons and not (isinstance(first, Convolution) and leaves.is_pointwise(first.conv)):
        reasons.append("no 1x1 convolution between pool and classifier")
    if not reasons:
        assert isinstance(first, Convolution)
        return [Head("head", pool, first, classifier)]  # type: ignore[arg-type]
    reason = "; ".join(dict.fromkeys(reasons))
    return [Own("head", module, reason) for module in (pool, flatten, classifier) if module is not None]
