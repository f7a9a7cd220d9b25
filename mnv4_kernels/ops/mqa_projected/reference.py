"""Torch-only definition of `mqa_projected`."""

from __future__ import annotations

import torch

from ..mqa.reference import reference as attention
from ..pwconv_bn_act.reference import reference as product


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    query_weight: torch.Tensor,  # [heads * Dk, C, 1, 1]
    query_scale: torch.Tensor | None,  # [heads * Dk]
    query_shift: torch.Tensor | None,  # [heads * Dk]
    key: torch.Tensor,  # [N, P, Dk]
    value: torch.Tensor,  # [N, P, Dv]
    output_weight: torch.Tensor,  # [K, heads * Dv, 1, 1]
    gamma: torch.Tensor | None,  # [K]
    residual: torch.Tensor | None,  # [N, K, H, W]
    heads: int,
    scale: float,
) -> torch.Tensor:
    """y = output(softmax(q k^T * scale) v) * gamma + residual, q = query(x) * query_scale + query_shift.

    Each product accumulates in float32; queries and attended values are rounded to x's dtype in between.
    """
    query = product(x, query_weight, query_scale, query_shift, "none", None, None)
    mixed = attention(query, key, value, heads, scale)
    return product(mixed, output_weight, None, None, "none", gamma, residual)
