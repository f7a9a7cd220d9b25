"""Models in train mode for tests, and what their gradients are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from models import SMALL, create, double_of, images, ops_called
from torch import nn

import mnv4_kernels as mk

Step = Callable[[nn.Module, torch.Tensor], torch.Tensor]

#: smooth, so that no rounding decides which side of a corner a value is on
SMOOTH = {"act_layer": "silu"}


def smooth(name: str = SMALL, **options: Any) -> nn.Module:
    """A model in train mode whose gradients are smooth in the rounding."""
    return create(name, **SMOOTH, **options).train()


def loss_of(result: torch.Tensor) -> torch.Tensor:
    """Weighs every logit differently."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return (result * weights).sum() + result.float().square().mean()


def trained(model: nn.Module, x: torch.Tensor, step: Step | None = None) -> dict[str, torch.Tensor]:
    """Gradients of parameters and input, and buffers, after one backward."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    loss_of(model(x) if step is None else step(model, x)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {**grads, "input": x.grad, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def assert_trains_alike(
    model: nn.Module,
    x: torch.Tensor | None = None,
    step: Step | None = None,
    used: bool = True,
    patched_step: Step | None = None,
) -> None:
    """Every gradient and buffer is as near to float64 as eager's, by norm, with a band for the roundings of a chain.

    Batch statistics of few values amplify the roundings before them by chance: eager's error is the larger of those
    that it makes in its two memory formats. The patched model may be stepped in another way, `patched_step`.
    """
    x = images(4, 3, 64, 64) if x is None else x
    exact = trained(double_of(copy.deepcopy(model)), x.double(), step)
    eager = trained(mk.unpatch(copy.deepcopy(model)), x, step)
    nhwc = torch.channels_last
    unpatched = mk.unpatch(copy.deepcopy(model)).to(memory_format=nhwc)
    other = trained(unpatched, x.contiguous(memory_format=nhwc), step)
    mk.patch(model)
    called = ops_called(lambda: trained(copy.deepcopy(model), x, step))
    assert ("bn_act_pwconv_backward" in called) is used
    ours = trained(model, x, patched_step or step)
    assert ours.keys() == eager.keys()
    grads = [value for name, value in exact.items() if ".running_" not in name and value.is_floating_point()]
    largest = max(value.norm().item() for value in grads)
    for name, true in exact.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(ours[name], eager[name])
            continue
        error, *errors = ((values[name].double() - true).norm().item() for values in (ours, eager, other))
        earned = max(errors)
        # about a hundred layers' roundings; a gradient that is zero but for rounding (a bias before a BatchNorm) counts
        # by what it is a sum of
        band = 64 * torch.finfo(torch.float32).eps * max(true.norm().item(), 1e-4 * largest)
        assert error <= 2 * (earned + band), f"{name}: error {error:.3g}, eager's {earned:.3g}, band {band:.3g}"


def norms_of(model: nn.Module) -> list[Any]:
    """Its BatchNorms."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
