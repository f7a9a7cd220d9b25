"""Torch-only definition of `head`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .._accumulate import affine_act, optional_like, wide


def reference(
    x: torch.Tensor,  # [N, C, H, W]
    weight: torch.Tensor,  # [F, C, 1, 1]
    scale: torch.Tensor | None,  # [F]
    shift: torch.Tensor | None,  # [F]
    act: str,
    classifier_weight: torch.Tensor | None,  # [K, F]
    classifier_bias: torch.Tensor | None,  # [K]
    packed: torch.Tensor | None = None,
    classifier_packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [N, K] of the pooled features, or the features [N, F] where there is no classifier; in float32."""
    pooled = wide(x).mean((2, 3), keepdim=True)
    y = affine_act(F.conv2d(pooled, weight.to(pooled.dtype)), scale, shift, act).flatten(1)
    if classifier_weight is not None:
        y = F.linear(y, classifier_weight.to(y.dtype), optional_like(classifier_bias, y))
    return y.to(x.dtype)
