"""Depthwise convolution computed inside the 1x1 convolution that consumes it: half a UIB block."""

from .contract import dwconv_pwconv

__all__ = ["dwconv_pwconv"]
