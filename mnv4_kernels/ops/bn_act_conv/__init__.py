"""Training: the BatchNorm and activation of what comes in, a dense convolution, and the moments of its result."""

from .contract import bn_act_conv, bn_act_conv_backward

__all__ = ["bn_act_conv", "bn_act_conv_backward"]
