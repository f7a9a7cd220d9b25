"""Launcher of `uib`: the gate's plan, over the kernels of the half blocks."""

from __future__ import annotations

from typing import Any

import torch

from ..dwconv_bn_act import triton_dwconv_bn_act as depthwise
from ..dwconv_pwconv import triton_dwconv_pwconv as fused
from ..gpu import gate
from ..gpu.gate import Decision, Plan, UibShape
from ..gpu.launch import Launch, answer, nhwc
from ..gpu.select import ceilings
from ..layout import memory_format_of
from ..pwconv_bn_act import triton_pwconv_bn_act as pointwise
from . import triton_expand_project as products
from .contract import fake, output_size


def shape_of(
    x: torch.Tensor,
    start_weight: torch.Tensor | None,
    start_stride: list[int],
    expand_weight: torch.Tensor,
    mid_weight: torch.Tensor | None,
    mid_stride: list[int],
    project_weight: torch.Tensor,
    residual: bool,
) -> UibShape:
    """What the gate decides on; it takes 'same' padding for granted, which decides no plan."""
    return UibShape(
        batch=x.shape[0],
        channels=x.shape[1],
        hidden=expand_weight.shape[0],
        outputs=project_weight.shape[0],
        height=x.shape[2],
        width=x.shape[3],
        start_kernel=0 if start_weight is None else start_weight.shape[2],
        mid_kernel=0 if mid_weight is None else mid_weight.shape[2],
        start_stride=1 if start_weight is None else start_stride[0],
        mid_stride=1 if mid_weight is None else mid_stride[0],
        residual=residual,
    )


def decide(
    x: torch.Tensor,
    start_weight: torch.Tensor | None,
    start_scale: torch.Tensor | None,
    start_shift: torch.Tensor | None,
    start_stride: list[int],
    start_padding: list[int],
    start_dilation: list[int],
    expand_weight: torch.Tensor,
    expand_scale: torch.Tensor | None,
    expand_shift: torch.Tensor | None,
    mid_weight: torch.Tensor | None,
    mid_scale: torch.Tensor | None,
    mid_shift: torch.Tensor | None,
    mid_stride: list[int],
    mid_padding: list[int],
    mid_dilation: list[int],
    act: str,
    project_weight: torch.Tensor,
    project_scale: torch.Tensor | None,
    project_shift: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: bool,
) -> Decision:
    """What the gate picks for this call."""
    shape = shape_of(x, start_weight, start_stride, expand_weight, mid_weight, mid_stride, project_weight, residual)
    return gate.uib(shape, x.element_size(), ceilings(x.device))


def build(
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
    plan: Plan | None = None,
) -> tuple[torch.Tensor, list[Launch]]:
    """The result, in channels_last memory and not yet written, and the launches that write it, in order."""
    x = nhwc(x)
    y = fake(
        x, start_weight, start_scale, start_shift, start_stride, start_padding, start_dilation,
        expand_weight, expand_scale, expand_shift, mid_weight, mid_scale, mid_shift, mid_stride, mid_padding,
        mid_dilation, act, project_weight, project_scale, project_shift, gamma, residual,
    )  # fmt: skip
    y = torch.empty_like(y, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, []
    if plan is None:
        plan = decide(
            x, start_weight, start_scale, start_shift, start_stride, start_padding, start_dilation,
            expand_weight, expand_scale, expand_shift, mid_weight, mid_scale, mid_shift, mid_stride, mid_padding,
            mid_dilation, act, project_weight, project_scale, project_shift, gamma, residual,
        ).plan  # fmt: skip
    start = (start_scale, start_shift, start_stride, start_padding, start_dilation, "none")
    expand = (expand_weight, expand_scale, expand_shift, act, None)
    mid = (mid_scale, mid_shift, mid_stride, mid_padding, mid_dilation, act)
    project = (project_weight, project_scale, project_shift, "none", gamma)
    size = (x.shape[2], x.shape[3])
    size = output_size(start_weight, start_stride, start_padding, start_dilation, size)
    images = min(plan.images, x.shape[0])
    # one scratch tensor for all parts of the batch: it is overwritten before L2 lets go of it
    hidden = (0 if plan.fuse_products else images, expand_weight.shape[0], *size)
    expanded = torch.empty(hidden, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launches: list[Launch] = []
    for first in range(0, x.shape[0], images):
        part = x[first : first + images]
        h, out = expanded[: part.shape[0]], y[first : first + images]
        shortcut = part if residual else None
        if plan.fuse_products:
            operand = part
            if start_weight is not None:
                operand, made = depthwise.build(part, start_weight, *start)
                launches += made
            launches += products.build(operand, *expand[:4], *project[:3], gamma, shortcut, out)
            continue
        if start_weight is not None and plan.fuse_start:
            launches += fused.build(part, start_weight, *start, *expand, None, out=h)[1]
        else:
            operand = part
            if start_weight is not None:
                operand, made = depthwise.build(part, start_weight, *start)
                launches += made
            launches += pointwise.build(operand, *expand, None, out=h)[1]
        if mid_weight is not None and plan.fuse_mid:
            launches += fused.build(h, mid_weight, *mid, *project, shortcut, out=out)[1]
        else:
            operand = h
            if mid_weight is not None:
                operand, made = depthwise.build(h, mid_weight, *mid)
                launches += made
            launches += pointwise.build(operand, *project, shortcut, out=out)[1]
    return y, launches


def uib(x: torch.Tensor, *others: Any) -> torch.Tensor:
    """CUDA implementation of the op; NCHW input is converted, and the result goes back to its format."""
    return answer(build(x, *others), memory_format_of(x))
