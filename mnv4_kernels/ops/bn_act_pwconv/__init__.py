"""Training: the BatchNorm and activation of what comes in, a 1x1 convolution, and the moments of its result."""

from .contract import bn_act_pwconv, bn_act_pwconv_backward

__all__ = ["bn_act_pwconv", "bn_act_pwconv_backward"]
