"""Torch-only definition of `mobile_attention`."""

from __future__ import annotations

import torch

from .._accumulate import affine_act, wide
from ..kv_downsample.reference import reference as keys_and_values
from ..layout import memory_format_of
from ..mqa.reference import reference as attention
from ..pwconv_bn_act.reference import reference as product


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    norm_scale: torch.Tensor | None,  # [C]
    norm_shift: torch.Tensor | None,  # [C]
    query_weight: torch.Tensor,  # [heads * Dk, C, 1, 1]
    query_shift: torch.Tensor | None,  # [heads * Dk]
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
    output_weight: torch.Tensor,  # [K, heads * Dv, 1, 1]
    output_shift: torch.Tensor | None,  # [K]
    gamma: torch.Tensor | None,  # [K]
    heads: int,
    scale: float,
    residual: bool,
) -> torch.Tensor:
    """y = (output(softmax(q k^T * scale) v) + output_shift) * gamma + x, all of q, k and v read from norm(x).

    Each product accumulates in float32; norm(x), queries, keys, values and attended values are rounded to x's dtype.
    """
    source = affine_act(wide(x), norm_scale, norm_shift, "none").to(x.dtype)
    paths = (key_down, key_scale, key_shift, key_project, value_down, value_scale, value_shift, value_project)
    key, value = keys_and_values(source, *paths, stride, padding, dilation)
    query = product(source, query_weight, None, query_shift, "none", None, None)
    mixed = attention(query, key, value, heads, scale)
    y = product(mixed, output_weight, None, output_shift, "none", gamma, x if residual else None)
    return y.contiguous(memory_format=memory_format_of(x))
