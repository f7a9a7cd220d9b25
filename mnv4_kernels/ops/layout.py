"""Memory-format rules and output sizes, shared by every fake and reference."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """True where an op computes and answers in NHWC: `x` is not plain NCHW and its channels are adjacent."""
    return not x.is_contiguous() and x.stride(1) == 1


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format of the result of an op on `x` [N, C, H, W]."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def conv_output_size(size: int, kernel: int, stride: int, pad_before: int, pad_after: int, dilation: int) -> int:
    """Output length of a convolution along one axis."""
    return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) // stride + 1


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's 'same' along one axis: ceil(size / stride) outputs, the odd element of padding after the image."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def empty_like_conv(
    x: torch.Tensor,
    channels: int,
    kernel: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """Uninitialised result of a convolution of `x` [N, C, H, W]; padding is (top, bottom, left, right)."""
    height = conv_output_size(x.shape[2], kernel[0], stride[0], padding[0], padding[1], dilation[0])
    width = conv_output_size(x.shape[3], kernel[1], stride[1], padding[2], padding[3], dilation[1])
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)
