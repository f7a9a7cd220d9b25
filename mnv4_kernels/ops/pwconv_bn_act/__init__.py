"""1x1 convolution as a matrix product, with its whole epilogue."""

from .contract import pwconv_bn_act

__all__ = ["pwconv_bn_act"]
