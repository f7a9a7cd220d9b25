"""A training step of a model as something that can be timed, and its gradients, by which it is judged first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

#: Small: the weights stay near those that the gradients were judged at, however many steps are timed.
LEARNING_RATE = 1e-6

#: What runs in a step instead of a model's forward.
Forward = Callable[[torch.Tensor], torch.Tensor]


class TrainingStep:
    """Forward, cross entropy, backward and a step of SGD with momentum, on one batch.

    Args:
        model: float32, in train mode; its parameters are updated.
        forward: `model` itself, or what a compiler made of it.
        x: images [N, 3, H, W].
        dtype: below float32: the forward runs under autocast.
    """

    def __init__(self, model: nn.Module, forward: Forward, x: torch.Tensor, dtype: torch.dtype) -> None:
        self._model, self._forward, self._x, self._dtype = model, forward, x, dtype
        # any model has two classes
        self._labels = torch.arange(len(x)) % 2
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def gradients(self) -> torch.Tensor:
        """[parameters] of the loss at the model's weights of now, each divided by its norm: all weigh the same."""
        self._backward()
        found = [p.grad.flatten() for p in self._model.parameters() if p.grad is not None]
        largest = max(grad.norm() for grad in found)
        # a bias before a BatchNorm has a gradient of rounding errors only
        return torch.cat([grad / grad.norm().clamp_min(1e-3 * largest) for grad in found]).detach()

    def saved_mb(self) -> float | None:
        """Activation memory: what a forward keeps for the backward, each storage once, without parameters and images.

        None where a compiler made the forward: it would make another one under the hooks that count.
        """
        if self._forward is not self._model:
            return None
        given = (*self._model.parameters(), *self._model.buffers(), self._x, self._labels)
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        # held until the end: no address is given out twice
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._loss()
        for tensor in given:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(storage.nbytes() for storage in kept.values()) / 1e6

    def __call__(self) -> torch.Tensor:
        """The whole step; the loss."""
        loss = self._backward()
        self._optimizer.step()
        return loss.detach()

    def _backward(self) -> torch.Tensor:
        self._optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        return loss

    def _loss(self) -> torch.Tensor:
        with torch.enable_grad():
            low = self._dtype in (torch.bfloat16, torch.float16)
            with torch.autocast("cpu", self._dtype if low else torch.bfloat16, enabled=low):
                logits = self._forward(self._x)
            return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), self._labels)
