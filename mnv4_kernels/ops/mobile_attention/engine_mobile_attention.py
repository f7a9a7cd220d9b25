"""CPU implementation of `mobile_attention`: a program of the engine, kept as long as the weights stay."""

from __future__ import annotations

import torch

from ..engine import Engine, engine_run, kept
from ..engine.affine import behind, expect, folded
from ..engine.builder import Builder, Geometry, Path
from ..engine.weights import Weight
from .reference import reference
from .support import declined


def mobile_attention(
    x: torch.Tensor,
    norm_scale: torch.Tensor | None,
    norm_shift: torch.Tensor | None,
    query_weight: torch.Tensor,
    query_shift: torch.Tensor | None,
    key_down: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    key_shift: torch.Tensor | None,
    key_project: torch.Tensor,
    value_down: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    value_shift: torch.Tensor | None,
    value_project: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_weight: torch.Tensor,
    output_shift: torch.Tensor | None,
    gamma: torch.Tensor | None,
    heads: int,
    scale: float,
    residual: bool,
) -> torch.Tensor:
    """The op on CPU tensors; the result lies as `x` does. Scales are folded before weights are rounded to x's dtype."""
    keys = (key_down, key_scale, key_shift, key_project)
    values = (value_down, value_scale, value_shift, value_project)
    norm = (norm_scale, norm_shift)
    _check(x, norm, query_weight, query_shift, keys, values, output_weight, output_shift, gamma, heads, residual)
    if declined(x, query_weight, key_down, value_down, heads, scale):
        return reference(
            x, norm_scale, norm_shift, query_weight, query_shift, *keys, *values, stride, padding, dilation,
            output_weight, output_shift, gamma, heads, scale, residual,
        )  # fmt: skip

    def make() -> Engine:
        with torch.no_grad():
            builder = Builder(x.shape[1], x.dtype)
            geometry = None if key_down is None else Geometry(key_down.shape[2:], stride, padding, dilation)
            node = builder.attention(
                0,
                norm,
                behind(Weight(query_weight.flatten(1)), query_shift, norm),
                _path(*keys, norm),
                _path(*values, norm),
                folded(output_weight.flatten(1), None, output_shift, gamma),
                heads,
                geometry,
                0 if residual else -1,
            )
            builder.output(node, 0)
            return Engine(*builder.finish(), builder.bfloat16)

    parameters = (*norm, query_weight, query_shift, *keys, *values, output_weight, output_shift, gamma)
    tensors = [tensor for tensor in parameters if tensor is not None]
    present = tuple(tensor is not None for tensor in parameters)
    window = (tuple(stride), tuple(padding), tuple(dilation))
    engine = kept(tensors, ("mobile_attention", x.dtype, present, window, heads, residual), make)
    y: torch.Tensor = engine_run(engine.handle, x, 0)[0]
    return y.to(x.dtype)


def _path(
    down: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    project: torch.Tensor,
    norm: tuple[torch.Tensor | None, torch.Tensor | None],
) -> Path:
    matrix = Weight(project.flatten(1))
    if down is not None:
        return Path(folded(down, scale, shift), (matrix, None))
    return Path(None, behind(*behind(matrix, None, (scale, shift)), norm))


def _check(
    x: torch.Tensor,
    norm: tuple[torch.Tensor | None, torch.Tensor | None],
    query_weight: torch.Tensor,
    query_shift: torch.Tensor | None,
    keys: tuple[torch.Tensor | None, ...],
    values: tuple[torch.Tensor | None, ...],
    output_weight: torch.Tensor,
    output_shift: torch.Tensor | None,
    gamma: torch.Tensor | None,
    heads: int,
    residual: bool,
) -> None:
    channels, outputs = x.shape[1], output_weight.shape[0]
    for name, vector in zip(("norm_scale", "norm_shift"), norm, strict=True):
        expect(name, vector, channels)
    for name, (down, scale, shift, project) in (("key", keys), ("value", values)):
        expect(f"{name}_down", down, channels, 1, None, None)
        expect(f"{name}_scale", scale, channels)
        expect(f"{name}_shift", shift, channels)
        expect(f"{name}_project", project, None, channels, 1, 1)
    assert keys[3] is not None
    assert values[3] is not None
    if keys[0] is not None:
        expect("value_down", values[0], *keys[0].shape)
    expect("query_weight", query_weight, heads * keys[3].shape[0], channels, 1, 1)
    expect("query_shift", query_shift, heads * keys[3].shape[0])
    expect("output_weight", output_weight, None, heads * values[3].shape[0], 1, 1)
    expect("output_shift", output_shift, outputs)
    expect("gamma", gamma, outputs)
    if residual:
        expect("x", x, None, outputs, None, None)
