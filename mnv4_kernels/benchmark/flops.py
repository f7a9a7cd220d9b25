"""Floating point operations of a model, counted, not estimated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def count_flops(model: nn.Module, input_size: tuple[int, ...], train: bool = False) -> int:
    """Operations of one forward pass of unpatched `model`, a multiply-add counted as two.

    Convolutions, linear layers, matrix products and attention are counted; normalisation,
    activations and pooling are not. Runs on a copy without storage, so it is quick and
    leaves `model` alone.

    Args:
        model: a module whose forward takes one tensor.
        input_size: of that tensor, e.g. [N, 3, H, W].
        train: count the backward pass as well: each product has two gradients, the first one's input none.
    """
    shell = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), _Counter() as counter:
        shell(torch.empty(input_size, device="meta"))
    return 3 * counter.total - counter.first if train else counter.total


def _conv(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * weight[0].numel()


def _matmul(result: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * x.shape[-1]


def _attention(result: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    positions = result.numel() // result.shape[-1]
    return 2 * positions * key.shape[-2] * (query.shape[-1] + result.shape[-1])


_COUNTED: dict[Any, Callable[..., int]] = {
    F.conv2d: _conv,
    F.linear: _matmul,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.bmm: _matmul,
    F.scaled_dot_product_attention: _attention,
}


class _Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = self.first = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COUNTED:
            self.total += _COUNTED[func](result, *args, **(kwargs or {}))
            self.first = self.first or self.total
        return result


def least_bytes(model: nn.Module, input_numel: int, element_size: int) -> int:
    """Bytes that any implementation must move: every parameter and the input once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (parameters + input_numel) * element_size
