"""How a program's arrays are made of a graph's tensors, as text: a graph is cached by what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..engine import Array, Weight


class Fold(NamedTuple):
    """A convolution or fully connected layer, by numbers of tensors; -1: there is none."""

    weight: int
    bias: int = -1
    mean: int = -1
    var: int = -1
    gamma: int = -1
    beta: int = -1
    eps: float = 0.0
    #: factors of the result's channels
    scale: int = -1


class Mean(NamedTuple):
    """An average pool: the depthwise convolution whose weights are all the same."""

    channels: int
    height: int
    width: int


#: one entry a node with arrays
Recipe = Sequence[Fold | Mean]


def encode(recipe: Recipe) -> str:
    """As text."""
    return json.dumps(recipe)


def decode(text: str) -> list[Fold | Mean]:
    """What `encode` was given."""
    return [Mean(*entry) if len(entry) == len(Mean._fields) else Fold(*entry) for entry in json.loads(text)]


def arrays_of(recipe: Recipe, tensors: Sequence[torch.Tensor]) -> list[Array]:
    """A weight and a bias for each entry: folded in float64, rounded to the weight's dtype, float32."""
    arrays: list[Array] = []
    for entry in recipe:
        if isinstance(entry, Mean):
            channels, height, width = entry
            weight = torch.full((channels, 1, height, width), 1.0 / (height * width))
            arrays += [weight, torch.zeros(channels)]
        else:
            arrays += _folded(entry, tensors)
    return arrays


def _folded(entry: Fold, tensors: Sequence[torch.Tensor]) -> list[Array]:
    def wide(index: int, otherwise: float) -> torch.Tensor:
        return tensors[index].double() if index >= 0 else torch.full((rows,), otherwise, dtype=torch.float64)

    stored = tensors[entry.weight]
    rows = stored.shape[0]
    shift = wide(entry.bias, 0.0)
    weight = Weight(stored)
    if entry.mean >= 0:
        scale = wide(entry.gamma, 1.0) * torch.rsqrt(wide(entry.var, 1.0) + entry.eps)
        shift = (shift - wide(entry.mean, 0.0)) * scale + wide(entry.beta, 0.0)
        weight = weight.scaled(scale)
    if entry.scale >= 0:
        factors = wide(entry.scale, 1.0)
        shift = shift * factors
        weight = weight.scaled(factors)
    return [lambda: weight.rounded(stored.dtype), shift.float()]
