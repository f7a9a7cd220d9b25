"""What can run `kv_downsample`, best first."""

from __future__ import annotations

import torch

from ..support import Backend, library_reasons, tensor_reasons, triton


def supports(
    x: torch.Tensor,
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
    packed: torch.Tensor | None = None,
) -> list[str]:
    """Why the C++ kernel can't run this call; empty list: it can."""
    tensors = tensor_reasons(
        x=x,
        key_down=key_down,
        key_scale=key_scale,
        key_shift=key_shift,
        key_project=key_project,
        value_down=value_down,
        value_scale=value_scale,
        value_shift=value_shift,
        value_project=value_project,
        packed=packed,
    )
    return [*library_reasons("kv_downsample"), *tensors]


BACKENDS = (Backend("cpp", supports), triton("kv_downsample"))
