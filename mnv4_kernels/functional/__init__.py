"""The fused ops as functions: friendly arguments, checked before anything runs, differentiable.

Activations are [N, C, H, W] in either memory format. The result is NHWC
(`torch.channels_last`) where the input is, else contiguous. Inputs are float32, bfloat16,
float16 or float64; sums are accumulated in float32 (float64 for float64) and the result is
rounded once, to the input's dtype. BatchNorm is given as a float32 scale and shift per
channel (`fold_batch_norm`). `act` is one of none, relu, relu6, hard_swish, silu, gelu
(erf) and gelu_tanh.

The first backend of the op's list that can run the call answers (`ops/<op>/support.py`),
else the torch-only reference, which also answers in forward-mode AD. Gradients reach every
floating-point argument but packed weights. Under autocast the activations and weights are
cast, scales and shifts are not.

A wrong type or dtype raises `TypeError`, a wrong rank, shape, device or value
`ValueError`; the message names the argument, what was expected and what was got.
"""

from __future__ import annotations

from .attention import kv_downsample, mobile_attention, mqa, mqa_projected
from .blocks import conv_pwconv, dwconv_pwconv, head, uib
from .convolutions import conv_bn_act, dwconv_bn_act, fold_batch_norm, prepack, pwconv_bn_act

__all__ = [
    "conv_bn_act",
    "conv_pwconv",
    "dwconv_bn_act",
    "dwconv_pwconv",
    "fold_batch_norm",
    "head",
    "kv_downsample",
    "mobile_attention",
    "mqa",
    "mqa_projected",
    "prepack",
    "pwconv_bn_act",
    "uib",
]
