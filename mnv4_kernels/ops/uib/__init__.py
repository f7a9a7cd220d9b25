"""The whole UniversalInvertedResidual block: both depthwise convolutions, both 1x1, layer scale, residual."""

from .contract import uib

__all__ = ["uib"]
