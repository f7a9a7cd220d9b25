"""Dense k x k convolution: the stem and EdgeResidual's 3x3."""

from .contract import conv_bn_act

__all__ = ["conv_bn_act"]
