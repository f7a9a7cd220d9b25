"""What `functional` accepts, and how it says no: attribute checks only, before anything runs.

Wrong types and dtypes raise `TypeError`; wrong ranks, shapes, devices and values raise
`ValueError`. Every message names the argument, what was expected and what was got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .ops.activation import ACTIVATIONS
from .ops.layout import conv_output_size, same_padding
from .ops.prepack import PANEL
from .ops.support import dtype_name

#: One number, (vertical, horizontal), (top, bottom, left, right), or TensorFlow's "same".
Padding = int | Sequence[int] | Literal["same"]

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def under_autocast(x: torch.Tensor) -> bool:
    """True where autocast will cast the operands that go with `x`, so that their dtypes may differ before it does."""
    return (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(x.device.type)


def check_activation(name: str, x: Any, rank: int = 4, dims: str = "[N, C, H, W]") -> None:
    """`x` is a floating-point tensor of `rank` dimensions."""
    _check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"`{name}` must be float32, bfloat16, float16 or float64, got {dtype_name(x.dtype)}")
    if x.dim() != rank:
        raise shape_error(name, dims, x)


def check_operand(name: str, value: Any, like: torch.Tensor, like_name: str = "x") -> None:
    """`value` is a tensor on `like`'s device, of `like`'s dtype unless autocast is about to cast both."""
    _check_tensor(name, value)
    if value.device != like.device:
        raise ValueError(f"`{name}` must be on `{like_name}`'s device, {like.device}, got {value.device}")
    if value.dtype != like.dtype and not (value.dtype in FLOATS and under_autocast(like)):
        raise TypeError(
            f"`{name}` must have `{like_name}`'s dtype, {dtype_name(like.dtype)}, got {dtype_name(value.dtype)}"
        )


def check_channels(name: str, value: Any, length: int, like: torch.Tensor, like_name: str = "x") -> None:
    """`value` is None or a float32 [length] on `like`'s device (float64 beside a float64 `like`)."""
    if value is None:
        return
    _check_tensor(name, value)
    if value.device != like.device:
        raise ValueError(f"`{name}` must be on `{like_name}`'s device, {like.device}, got {value.device}")
    if value.dtype != torch.float32 and not (value.dtype == torch.float64 == like.dtype):
        wanted = "float32 or float64" if like.dtype == torch.float64 else "float32"
        raise TypeError(f"`{name}` must be {wanted}, got {dtype_name(value.dtype)}")
    if value.dim() != 1 or value.shape[0] != length:
        raise shape_error(name, f"[{length}]", value)


def check_depthwise(name: str, weight: torch.Tensor, channels: int) -> None:
    """`weight` is [channels, 1, kh, kw]."""
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise shape_error(name, f"[{channels}, 1, kh, kw]", weight)


def check_dense(name: str, weight: torch.Tensor, channels: int) -> None:
    """`weight` is [K, channels, kh, kw]."""
    if weight.dim() != 4 or weight.shape[1] != channels:
        raise shape_error(name, f"[K, {channels}, kh, kw]", weight)


def check_pointwise(name: str, weight: torch.Tensor, channels: int) -> None:
    """`weight` is [K, channels, 1, 1]."""
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise shape_error(name, f"[K, {channels}, 1, 1]", weight)


def check_residual(value: Any, expected: Sequence[int], x: torch.Tensor) -> None:
    """`value` is None or a tensor like `x`, of the result's shape."""
    if value is None:
        return
    check_operand("residual", value, x)
    if tuple(value.shape) != tuple(expected):
        raise shape_error("residual", str(list(expected)), value)


def check_packed(name: str, value: Any, *weights: torch.Tensor) -> None:
    """`value` is None or has the size of what `prepack` makes of `weights`, one after the other."""
    if value is None:
        return
    _check_tensor(name, value)
    if value.dtype != torch.float32:
        raise TypeError(f"`{name}` must be float32, got {dtype_name(value.dtype)}")
    if value.device != weights[0].device:
        raise ValueError(f"`{name}` must be on its weight's device, {weights[0].device}, got {value.device}")
    expected = sum(map(packed_size, weights))
    if value.dim() != 1 or value.shape[0] != expected:
        raise ValueError(f"`{name}` must be what prepack gives, of shape [{expected}], got {tuple(value.shape)}")


def packed_size(weight: torch.Tensor) -> int:
    """Floats that `prepack` makes of `weight`: output channels rounded up to a panel."""
    filters = weight.shape[0]
    return -(-filters // PANEL) * PANEL * (weight.numel() // max(filters, 1))


def check_act(act: Any, name: str = "act") -> None:
    """`act` names an activation that the epilogues know."""
    if act not in ACTIVATIONS:
        raise ValueError(f"`{name}` must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


def shape_error(name: str, expected: str, value: torch.Tensor) -> ValueError:
    """The error for a tensor of the wrong shape."""
    return ValueError(f"`{name}` must have shape {expected}, got {tuple(value.shape)}")


def pair(name: str, value: Any) -> list[int]:
    """`value` as [vertical, horizontal], both at least 1."""
    both = [value, value] if isinstance(value, int) else value
    if not _are_ints(both) or len(both) != 2:
        raise TypeError(f"`{name}` must be an int or a pair of ints, got {value!r}")
    if both[0] < 1 or both[1] < 1:
        raise ValueError(f"`{name}` must be positive, got {value!r}")
    return list(both)


def geometry(
    size: Sequence[int],
    weight: torch.Tensor,  # [K, C or 1, kh, kw]
    stride: Any,
    padding: Any,
    dilation: Any,
    *,
    weight_name: str = "weight",
    prefix: str = "",
    map_name: str = "`x`",
) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) as the ops take them: pairs, and padding as [top, bottom, left, right].

    Args:
        size: (height, width) of what is convolved.
        weight: of the convolution.
        stride, padding, dilation: as the caller gave them.
        weight_name: what errors call `weight`.
        prefix: of the names that errors give the other three.
        map_name: what errors call the map of that size.
    """
    kernel = weight.shape[2:]
    if kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"`{weight_name}` must have a kernel of at least 1 x 1, got {tuple(weight.shape)}")
    stride, dilation = pair(f"{prefix}stride", stride), pair(f"{prefix}dilation", dilation)
    sides = _sides(f"{prefix}padding", size, kernel, stride, padding, dilation)
    height = conv_output_size(size[0], kernel[0], stride[0], sides[0], sides[1], dilation[0])
    width = conv_output_size(size[1], kernel[1], stride[1], sides[2], sides[3], dilation[1])
    if height < 1 or width < 1:
        raise ValueError(
            f"{map_name} must be as large as the kernel once padded, got {size[0]} x {size[1]} with padding {sides} "
            f"for a kernel of {kernel[0]} x {kernel[1]} with dilation {dilation}"
        )
    return stride, sides, dilation


def _sides(
    name: str, size: Sequence[int], kernel: Sequence[int], stride: list[int], padding: Any, dilation: list[int]
) -> list[int]:
    if padding == "same":
        top, bottom = same_padding(size[0], kernel[0], stride[0], dilation[0])
        left, right = same_padding(size[1], kernel[1], stride[1], dilation[1])
        return [top, bottom, left, right]
    if isinstance(padding, int):
        sides = [padding] * 4
    elif _are_ints(padding) and len(padding) == 2:
        sides = [padding[0], padding[0], padding[1], padding[1]]
    elif _are_ints(padding) and len(padding) == 4:
        sides = list(padding)
    else:
        raise TypeError(
            f"`{name}` must be an int, (vertical, horizontal), (top, bottom, left, right) or 'same', got {padding!r}"
        )
    if min(sides) < 0:
        raise ValueError(f"`{name}` must not be negative, got {padding!r}")
    return sides


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}")


def _are_ints(values: Any) -> bool:
    # SymInt: sizes of a graph with dynamic shapes
    return isinstance(values, (tuple, list)) and all(isinstance(value, (int, torch.SymInt)) for value in values)
