"""From tensors to a Triton launch: memory layout, specialisation, and the launch itself as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .config import Config

#: Element offsets above this need 64-bit addressing.
INT32_EXTENT = 2**31 - 1


#: Kernels' arguments that decide the width of no access: Triton would compile anew for those that 16 divides and for 1.
#: What does decide it has its divisor in a constant, see `channel_vector`.
SIZES = (
    "m", "positions", "pixels", "columns", "n_strips", "height", "width", "out_h", "out_w", "phase_h", "phase_w",
    "shift_h", "shift_w", "rows", "part", "n_groups", "k_groups", "channel_groups", "hidden_groups", "output_groups",
)  # fmt: skip

#: What a backward's `build` answers: a gradient of each input, an empty tensor for what is absent or not needed.
Gradients = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch that has not happened yet: run it here, or compile it for a device that is not here."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    outputs: tuple[torch.Tensor, ...] = field(default=())

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options; fusion of multiply and add is asked for because Triton's default is changing."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launches on the current stream of the arguments' device."""
        device = self.arguments[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.arguments, **self.constants, **self.options)
        else:
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """`x` [N, C, H, W] in dense channels_last memory; copies only where it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def in_format(y: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """`y` [N, C, H, W] with just the strides that `torch.empty` gives it in `memory_format`; no map: as it is.

    With one channel or one pixel both formats are the same memory, and `contiguous` leaves the
    strides of the other one, which a compiled graph refuses.
    """
    if y.dim() != 4:
        return y
    y = y.contiguous(memory_format=memory_format)
    _, c, h, w = (max(size, 1) for size in y.shape)
    strides = (c * h * w, 1, w * c, c) if memory_format == torch.channels_last else (c * h * w, h * w, w, 1)
    return y if y.stride() == strides else y.as_strided(y.shape, strides)


def answer(built: tuple[Any, list[Launch]], memory_format: torch.memory_format = torch.channels_last) -> Any:
    """Runs the launches of a `build` and gives its result, of several the first, in `memory_format` if it is a map."""
    results, launches = built
    for launch in launches:
        launch.run()
    if not isinstance(results, torch.Tensor):
        y, *others = results
        return in_format(y, memory_format), *others
    return in_format(results, memory_format)


def tap_major(weight: torch.Tensor) -> torch.Tensor:
    """Depthwise `weight` [C, 1, kh, kw] as a dense [kh, kw, C] tensor.

    Free for a weight whose memory already is tap-major (see `store_tap_major`), a small copy otherwise.
    """
    return weight[:, 0].permute(1, 2, 0).contiguous()


def store_tap_major(weight: torch.Tensor) -> torch.Tensor:
    """The same depthwise `weight` [C, 1, kh, kw] in tap-major memory, so that no call copies it."""
    return weight[:, 0].permute(1, 2, 0).contiguous().permute(2, 0, 1).unsqueeze(1)


def channel_vector(*channels: int) -> int:
    """Largest of 16, 8, 4, 2, 1 that divides all channel counts.

    Triton proves a 16-byte access only from divisors that it can see: a kernel gets `channels / VEC`
    as an argument and VEC as a constant, because its own specialisation stops at multiples of 16
    and the models have 24, 40, 72 and 120 channels.
    """
    return next(vector for vector in (16, 8, 4, 2, 1) if all(count % vector == 0 for count in channels))


def geometry_constants(
    kernel: tuple[int, int], stride: list[int], padding: list[int], dilation: list[int]
) -> dict[str, int]:
    """What the kernels know of a convolution when they are compiled."""
    return {
        "PAD_T": padding[0],
        "PAD_L": padding[2],
        "KERNEL_H": kernel[0],
        "KERNEL_W": kernel[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
    }


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """True where an element offset into any of the tensors can pass 2^31, be they dense or views of larger ones."""
    return any(tensor is not None and _extent(tensor) > INT32_EXTENT for tensor in tensors)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to its last, whatever lies between."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def dot_precision(x: torch.Tensor) -> str:
    """How a kernel multiplies matrices of `x`'s dtype.

    float32 follows eager's convolutions: tf32 where cuDNN may use it, exact otherwise. On CPU tensors, in
    Triton's interpreter, 16-bit operands are widened: it multiplies the bits of a bfloat16 as integers.
    The products are exact either way.
    """
    if x.dtype == torch.float32:
        # not `cudnn.allow_tf32`, which raises once anybody has set this newer flag
        flags: Any = torch.backends.cudnn
        return "tf32" if flags.conv.fp32_precision == "tf32" else "ieee"
    return "widened" if x.device.type == "cpu" else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()
