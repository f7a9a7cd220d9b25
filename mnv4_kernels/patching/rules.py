"""The table: which timm class has which drop-in. A timm class is added by one rule."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..modules import HEAD, STEM, DropIn
from . import dropins


class Rule(NamedTuple):
    """One row: instances of exactly `replaces` become `dropin`."""

    dropin: type[DropIn]
    #: the pieces that the drop-in computes as one; "" is the whole module
    pieces: tuple[str, ...] = ("",)
    #: methods that the drop-in overrides: an instance with its own keeps it
    methods: tuple[str, ...] = ("forward",)

    @property
    def replaces(self) -> type[nn.Module]:
        """timm's class."""
        return self.dropin._mnv4_base


_NETWORK = ("forward", "forward_features", "forward_head", "forward_intermediates")

RULES: dict[type[nn.Module], Rule] = {
    rule.replaces: rule
    for rule in (
        Rule(dropins.FusedConvNormAct),
        Rule(dropins.FusedConvBnAct),
        Rule(dropins.FusedEdgeResidual),
        Rule(dropins.FusedUniversalInvertedResidual),
        Rule(dropins.FusedMultiQueryAttention2d),
        Rule(dropins.FusedMobileAttention),
        Rule(dropins.FusedMobileNetV3, (STEM, HEAD), _NETWORK),
        Rule(dropins.FusedMobileNetV3Features, (STEM,)),
    )
}


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for `module`, patched or not; None where there is none."""
    cls = module._mnv4_base if isinstance(module, DropIn) else type(module)
    return RULES.get(cls)
