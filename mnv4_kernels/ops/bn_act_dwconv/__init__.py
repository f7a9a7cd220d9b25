"""Training: the BatchNorm and activation of what comes in, a depthwise convolution, and the moments of its result."""

from .contract import bn_act_dwconv, bn_act_dwconv_backward

__all__ = ["bn_act_dwconv", "bn_act_dwconv_backward"]
