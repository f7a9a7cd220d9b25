"""CPU implementation of `uib`: a program of the engine, kept as long as the weights stay."""

from __future__ import annotations

import torch

from ..engine import Engine, engine_run, kept
from ..engine.affine import expect, folded
from ..engine.builder import Builder, Geometry
from ..support import CPP_DTYPES
from .contract import output_size
from .reference import reference


def uib(
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
) -> torch.Tensor:
    """The op on CPU tensors; the result lies as `x` does. Scales are folded before weights are rounded to x's dtype."""
    if x.dtype not in CPP_DTYPES:
        return reference(
            x, start_weight, start_scale, start_shift, start_stride, start_padding, start_dilation,
            expand_weight, expand_scale, expand_shift, mid_weight, mid_scale, mid_shift, mid_stride, mid_padding,
            mid_dilation, act, project_weight, project_scale, project_shift, gamma, residual,
        )  # fmt: skip
    start = (start_weight, start_scale, start_shift)
    expand = (expand_weight, expand_scale, expand_shift)
    mid = (mid_weight, mid_scale, mid_shift)
    project = (project_weight, project_scale, project_shift, gamma)
    geometries = ((start_stride, start_padding, start_dilation), (mid_stride, mid_padding, mid_dilation))

    def make() -> Engine:
        with torch.no_grad():
            builder = Builder(expand_weight.shape[1], x.dtype)
            node = 0
            if start_weight is not None:
                geometry = Geometry(start_weight.shape[2:], *geometries[0])
                node = builder.convolution("depthwise", node, *folded(start_weight, *start[1:]), "none", geometry)
            one = Geometry((1, 1))
            node = builder.convolution("pointwise", node, *folded(*expand), act, one)
            if mid_weight is not None:
                geometry = Geometry(mid_weight.shape[2:], *geometries[1])
                node = builder.convolution("depthwise", node, *folded(mid_weight, *mid[1:]), act, geometry)
            shortcut = 0 if residual else -1
            node = builder.convolution("pointwise", node, *folded(*project), "none", one, shortcut)
            builder.output(node, 0)
            return Engine(*builder.finish(), builder.bfloat16)

    channels, hidden, outputs = x.shape[1], expand_weight.shape[0], project_weight.shape[0]
    expect("start_weight", start_weight, channels, 1, None, None)
    expect("expand_weight", expand_weight, hidden, channels, 1, 1)
    expect("mid_weight", mid_weight, hidden, 1, None, None)
    expect("project_weight", project_weight, outputs, hidden, 1, 1)
    for names, size, vectors in (
        (("start_scale", "start_shift"), channels, start[1:]),
        (("expand_scale", "expand_shift"), hidden, expand[1:]),
        (("mid_scale", "mid_shift"), hidden, mid[1:]),
        (("project_scale", "project_shift", "gamma"), outputs, project[1:]),
    ):
        for name, vector in zip(names, vectors, strict=True):
            expect(name, vector, size)
    if residual:
        middle = output_size(start_weight, *geometries[0], (x.shape[2], x.shape[3]))
        expect("x", x, None, outputs, *output_size(mid_weight, *geometries[1], middle))
    parameters = (*start, *expand, *mid, *project)
    tensors = [tensor for tensor in parameters if tensor is not None]
    present = tuple(tensor is not None for tensor in parameters)
    windows = tuple(tuple(values) for geometry in geometries for values in geometry)
    engine = kept(tensors, ("uib", x.dtype, present, windows, act, residual), make)
    y: torch.Tensor = engine_run(engine.handle, x, 0)[0]
    return y.to(x.dtype)
