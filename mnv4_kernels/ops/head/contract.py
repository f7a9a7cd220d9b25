"""Schema, fake and dispatch of `head`."""

from __future__ import annotations

import torch

from .._contract import define
from .reference import reference


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str,
    classifier_weight: torch.Tensor | None,
    classifier_bias: torch.Tensor | None,
    packed: torch.Tensor | None = None,
    classifier_packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same shape, dtype and strides as the kernels."""
    features = weight.shape[0] if classifier_weight is None else classifier_weight.shape[0]
    return x.new_empty((x.shape[0], features))


head = define(
    "head(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, str act, Tensor? classifier_weight, "
    "Tensor? classifier_bias, Tensor? packed=None, Tensor? classifier_packed=None) -> Tensor",
    fake=fake,
    reference=reference,
    autocast=("x", "weight", "classifier_weight", "classifier_bias"),
)
