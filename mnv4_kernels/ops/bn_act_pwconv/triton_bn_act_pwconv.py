"""Launcher of `bn_act_pwconv`: `bn_act_conv`'s kernel with one tap."""

from __future__ import annotations

from typing import Any

import torch

from ..bn_act_conv import triton_bn_act_conv as dense
from ..bn_act_conv.reference import Moments
from ..gpu.config import GemmConfig
from ..gpu.launch import Launch, answer
from ..layout import memory_format_of
from .reference import GEOMETRY, reference


def build(
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor | None,  # [C]
    var: torch.Tensor | None,  # [C]
    gamma: torch.Tensor | None,  # [C]
    beta: torch.Tensor | None,  # [C]
    eps: float,
    act: str,
    weight: torch.Tensor,  # [K, C, 1, 1]
    moments: bool,
    config: GemmConfig | None = None,
    int64: bool | None = None,
) -> tuple[Moments, list[Launch]]:
    """(z in channels_last memory, mean, variance), not yet written, and the launches that write them."""
    normalisation = (mean, var, gamma, beta, eps, act)
    return dense.build(x, *normalisation, weight, *GEOMETRY, moments, False, config, int64, "bn_act_pwconv")


def bn_act_pwconv(x: torch.Tensor, *others: Any) -> Moments:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    if x.numel() == 0:
        return reference(x, *others)
    return answer(build(x, *others), memory_format_of(x))
