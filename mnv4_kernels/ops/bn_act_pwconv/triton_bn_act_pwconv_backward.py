"""Launcher of `bn_act_pwconv_backward`: `bn_act_conv_backward`'s kernels with one tap."""

from __future__ import annotations

from typing import Any

import torch

from ..bn_act_conv import triton_bn_act_conv_backward as dense
from ..gpu.config import GemmConfig, SplitConfig
from ..gpu.launch import Gradients, Launch, answer
from ..layout import memory_format_of
from .reference import GEOMETRY, backward_reference


def build(
    grad: torch.Tensor,  # [N, K, H, W]
    grad_mean: torch.Tensor | None,  # [K]
    grad_var: torch.Tensor | None,  # [K]
    z: torch.Tensor | None,  # [N, K, H, W]
    z_mean: torch.Tensor | None,  # [K]
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    need_input: bool,
    need_weight: bool,
    config: GemmConfig | None = None,
    split: SplitConfig | None = None,
    int64: bool | None = None,
) -> tuple[Gradients, list[Launch]]:
    """(dx in channels_last memory, dmean, dvar, dgamma, dbeta, dweight), not yet written, and the launches."""
    return dense.build(
        grad, grad_mean, grad_var, z, z_mean, x, mean, var, gamma, beta, eps, act, weight, *GEOMETRY, need_input,
        need_weight, config, split, int64, "bn_act_pwconv_backward",
    )  # fmt: skip


def bn_act_pwconv_backward(*arguments: Any) -> Gradients:
    """CUDA implementation of the op; maps are converted to NHWC, and dx goes back to x's format."""
    x = arguments[5]
    if x.numel() == 0:
        return backward_reference(*arguments)
    return answer(build(*arguments), memory_format_of(x))
