"""Training: BatchNorm, activation, layer scale, stochastic depth and skip: where a block's result becomes memory."""

from .contract import bn_act, bn_act_backward

__all__ = ["bn_act", "bn_act_backward"]
