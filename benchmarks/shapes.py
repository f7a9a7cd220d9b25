"""The calls that a model of timm makes of each op, read off the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

from mnv4_kernels.benchmark.case import default_size


@dataclass(frozen=True)
class ConvShape:
    """One distinct convolution of a model."""

    op: str
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    #: how often the model makes this call
    count: int

    @property
    def name(self) -> str:
        """For example `pwconv_bn_act 96->384 14x14 k1 s1 x3`."""
        height, width = self.size
        return (
            f"{self.op} {self.channels}->{self.outputs} {height}x{width} k{self.kernel[0]} s{self.stride[0]} "
            f"x{self.count}"
        )


def conv_shapes(model: str) -> list[ConvShape]:
    """Distinct convolutions of `model` at its default size, in order of appearance."""
    seen: dict[tuple[object, ...], int] = {}
    size = default_size(model)
    with torch.device("meta"):
        network = timm.create_model(model).eval()

    def record(conv: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == conv.in_channels and conv.groups > 1:
            op = "dwconv_bn_act"
        else:
            op = "pwconv_bn_act" if conv.kernel_size == (1, 1) and conv.stride == (1, 1) else "conv_bn_act"
        (x,) = inputs
        geometry = (tuple(x.shape[2:]), conv.kernel_size, conv.stride, conv.padding)
        key = (op, conv.in_channels, conv.out_channels, *geometry)
        seen[key] = seen.get(key, 0) + 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        network(torch.empty((1, 3, size, size), device="meta"))
    return [ConvShape(*key, count=count) for key, count in seen.items()]  # type: ignore[arg-type]
