"""Torch-only definition of `uib`."""

from __future__ import annotations

import torch

from ..dwconv_pwconv.reference import reference as depthwise_then_product
from ..layout import memory_format_of
from ..pwconv_bn_act.reference import reference as product


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    start_weight: torch.Tensor | None,  # [C, 1, kh, kw]
    start_scale: torch.Tensor | None,  # [C]
    start_shift: torch.Tensor | None,  # [C]
    start_stride: list[int],
    start_padding: list[int],  # top, bottom, left, right
    start_dilation: list[int],
    expand_weight: torch.Tensor,  # [E, C, 1, 1]
    expand_scale: torch.Tensor | None,  # [E]
    expand_shift: torch.Tensor | None,  # [E]
    mid_weight: torch.Tensor | None,  # [E, 1, kh, kw]
    mid_scale: torch.Tensor | None,  # [E]
    mid_shift: torch.Tensor | None,  # [E]
    mid_stride: list[int],
    mid_padding: list[int],
    mid_dilation: list[int],
    act: str,
    project_weight: torch.Tensor,  # [K, E, 1, 1]
    project_scale: torch.Tensor | None,  # [K]
    project_shift: torch.Tensor | None,  # [K]
    gamma: torch.Tensor | None,  # [K]
    residual: bool,
) -> torch.Tensor:
    """y = project(mid(act(expand(start(x))))) * gamma + x; dw_mid is followed by act, dw_start and project are not.

    Each product accumulates in float32; the operands of products and the expanded tensor are rounded to x's dtype.
    """
    expand = (expand_weight, expand_scale, expand_shift, act, None, None)
    project = (project_weight, project_scale, project_shift, "none", gamma, x if residual else None)
    start = (start_scale, start_shift, start_stride, start_padding, start_dilation, "none")
    mid = (mid_scale, mid_shift, mid_stride, mid_padding, mid_dilation, act)
    h = product(x, *expand) if start_weight is None else depthwise_then_product(x, start_weight, *start, *expand)
    y = product(h, *project) if mid_weight is None else depthwise_then_product(h, mid_weight, *mid, *project)
    return y.contiguous(memory_format=memory_format_of(x))
