"""Depthwise k x k convolution, BatchNorm as scale and shift, activation."""

from .contract import dwconv_bn_act

__all__ = ["dwconv_bn_act"]
