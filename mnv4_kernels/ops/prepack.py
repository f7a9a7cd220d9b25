"""`prepack`: a convolution's weight in the order in which the CPU microkernels read it."""

from __future__ import annotations

import torch

from ._contract import define

#: Output channels of one panel of packed weights; the C++ side's `kPanel`, compared by a test.
PANEL = 16


def _size(weight: torch.Tensor, depthwise: bool) -> int:
    channels = -(-weight.shape[0] // PANEL) * PANEL
    taps = weight.shape[2] * weight.shape[3] if weight.dim() == 4 else 1
    return channels * (1 if depthwise else weight.shape[1]) * taps


def fake(weight: torch.Tensor, depthwise: bool) -> torch.Tensor:
    """1-D float32: output channels in whole panels."""
    return torch.empty(_size(weight, depthwise), dtype=torch.float32, device=weight.device)


def reference(weight: torch.Tensor, depthwise: bool) -> torch.Tensor:
    """Only the C++ library reads packed weights, so only it packs them."""
    raise RuntimeError("mnv4_kernels::prepack needs the C++ library, which is not loaded; pass packed=None instead")


prepack = define(
    "prepack(Tensor weight, bool depthwise) -> Tensor", fake=fake, reference=reference, differentiable=False
)
