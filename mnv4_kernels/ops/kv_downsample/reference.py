"""Torch-only definition of `kv_downsample`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, wide


def _path(
    x: torch.Tensor,
    down: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    project: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    y = wide(x)
    if down is not None:
        top, bottom, left, right = padding
        y = F.pad(y, (left, right, top, bottom))
        y = F.conv2d(y, down.to(y.dtype), None, stride, 0, dilation, groups=x.shape[1])
    y = affine_act(y, scale, shift, "none")
    y = F.conv2d(y, project.to(y.dtype))
    # [N, P, D]: a position's vector is contiguous, as attention reads it
    return y.flatten(2).transpose(1, 2).contiguous().to(x.dtype)


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    key_down: torch.Tensor | None,  # [C, 1, kh, kw]
    key_scale: torch.Tensor | None,  # [C]
    key_shift: torch.Tensor | None,  # [C]
    key_project: torch.Tensor,  # [Dk, C, 1, 1]
    value_down: torch.Tensor | None,  # [C, 1, kh, kw]
    value_scale: torch.Tensor | None,  # [C]
    value_shift: torch.Tensor | None,  # [C]
    value_project: torch.Tensor,  # [Dv, C, 1, 1]
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    packed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(key [N, P, Dk], value [N, P, Dv]); without depthwise weights P = H * W."""
    geometry = (stride, padding, dilation)
    key = _path(x, key_down, key_scale, key_shift, key_project, *geometry)
    value = _path(x, value_down, value_scale, value_shift, value_project, *geometry)
    return key, value
