"""Schema, fake and dispatch of `bn_act_dwconv` and its backward."""

from __future__ import annotations

import functools

from .. import _differentiate
from .._contract import define
from ..bn_act_conv.contract import backward_fake, fake
from .reference import backward_reference, reference

bn_act_dwconv_backward = define(
    "bn_act_dwconv_backward(Tensor grad, Tensor? grad_mean, Tensor? grad_var, Tensor? z, Tensor? z_mean, Tensor x, "
    "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, Tensor weight, int[] stride, "
    "SymInt[] padding, int[] dilation, bool need_input, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=backward_fake,
    reference=backward_reference,
    differentiable=False,
)

bn_act_dwconv = define(
    "bn_act_dwconv(Tensor x, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act, "
    "Tensor weight, int[] stride, SymInt[] padding, int[] dilation, bool moments) -> (Tensor, Tensor, Tensor)",
    fake=fake,
    reference=reference,
    autocast=("x", "weight"),
    backward=bn_act_dwconv_backward,
    formula=functools.partial(_differentiate.convolution, moments_at=11),
)
