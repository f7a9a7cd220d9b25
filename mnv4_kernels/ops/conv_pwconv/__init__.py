"""A dense convolution and the 1x1 convolution behind it in one pass: EdgeResidual, the small models' first stages."""

from .contract import conv_pwconv

__all__ = ["conv_pwconv"]
