"""timm models for tests: seeded, with values that show errors, and judged against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NAMES = (
    "mobilenetv4_conv_aa_large",
    "mobilenetv4_conv_aa_medium",
    "mobilenetv4_conv_blur_medium",
    "mobilenetv4_conv_large",
    "mobilenetv4_conv_medium",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_small_035",
    "mobilenetv4_conv_small_050",
    "mobilenetv4_hybrid_large",
    "mobilenetv4_hybrid_large_075",
    "mobilenetv4_hybrid_medium",
    "mobilenetv4_hybrid_medium_075",
)

SMALL = "mobilenetv4_conv_small_035"
HYBRID = "mobilenetv4_hybrid_medium_075"


def randomize_(model: nn.Module, seed: int = 0, channels: int = 3, size: int = 64) -> nn.Module:
    """Gives norms and layer scales values that show errors, in place; fresh ones are 0, 1 and 1e-5.

    Variances are those of random images of `size` on their way through the model, perturbed: with
    made-up ones, or another size's, activations grow from block to block, until attention is a hard choice
    that any rounding tips.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    def adapt(norm: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if norm.running_mean is not None:
            # of all channels together: one that is silent for these images would shout for others
            power = arguments[0].pow(2).mean()
            norm.running_var.copy_(power * uniform(norm.running_var, 0.5, 1.5))
            norm.running_mean.copy_(power.sqrt() * uniform(norm.running_mean, -0.3, 0.3))

    handles = []
    with torch.no_grad():
        for module in model.modules():
            gamma = getattr(module, "gamma", None)
            if isinstance(gamma, nn.Parameter):
                gamma.copy_(uniform(gamma, 0.2, 1.0))
            if isinstance(module, nn.BatchNorm2d):
                handles.append(module.register_forward_pre_hook(adapt))
                if module.affine:
                    module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                    module.bias.copy_(uniform(module.bias, -0.5, 0.5))
        training = model.training
        model.eval()(images(4 if size == 64 else 1, channels, size, size, seed=2))
    for handle in handles:
        handle.remove()
    return model.train(training)


def create(name: str = SMALL, seed: int = 0, size: int = 64, **options: Any) -> nn.Module:
    """timm's model `name` in eval mode, float32, random weights, norms randomised for images of `size`."""
    import timm

    torch.manual_seed(seed)
    return randomize_(timm.create_model(name, **options), seed, options.get("in_chans", 3), size).eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random images; two of 3 x 64 x 64 unless told otherwise."""
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in a model's result, flat."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result for tensor in tensors_of(item)]


def assert_as_exact(actual: Any, eager: Any, exact: Any, roundings: int = 1) -> None:
    """The norm of each result's error against float64 is at most twice eager's plus a rounding band.

    Args:
        actual, eager, exact: a tensor, or nested lists of them; the last in float64.
        roundings: how often values are rounded on their way; half a unit in the last place
            each adds up as their root.
    """
    assert len(tensors_of(actual)) == len(tensors_of(eager)) == len(tensors_of(exact))
    for mine, theirs, true in zip(tensors_of(actual), tensors_of(eager), tensors_of(exact), strict=True):
        assert mine.shape == theirs.shape == true.shape
        assert mine.dtype == theirs.dtype
        assert bool(mine.isfinite().all())
        error = torch.linalg.vector_norm(mine.double() - true).item()
        earned = torch.linalg.vector_norm(theirs.double() - true).item()
        band = math.sqrt(roundings) * torch.finfo(mine.dtype).eps / 2 * torch.linalg.vector_norm(true).item()
        assert error <= 2 * (earned + band), f"error {error:.3g}, eager's {earned:.3g}, rounding {band:.3g}"


def assert_same_strides(actual: Any, expected: Any) -> None:
    """Each result lies in memory as it does in eager."""
    for mine, theirs in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert mine.stride() == theirs.stride()


def double_of(model: nn.Module) -> nn.Module:
    """An unpatched float64 copy."""
    import mnv4_kernels as mk

    return mk.unpatch(copy.deepcopy(model)).double()


def convolutions(model: nn.Module) -> int:
    """How many there are."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


Call = Callable[[nn.Module, torch.Tensor], Any]


def forward(model: nn.Module, x: torch.Tensor) -> Any:
    """model(x)"""
    return model(x)


def assert_patched_is_as_exact(model: nn.Module, x: torch.Tensor, call: Call = forward) -> Any:
    """Patches `model`; its `call` on `x` is as exact as before, in the same memory format. Returns the report."""
    import mnv4_kernels as mk

    with torch.no_grad():
        eager = call(model, x.clone())
        exact = call(double_of(model), x.double())
        report = mk.patch(model)
        actual = call(model, x.clone())
    assert_as_exact(actual, eager, exact, roundings=convolutions(model))
    assert_same_strides(actual, eager)
    return report


def ops_called(call: Callable[[], Any]) -> list[str]:
    """Names of the mnv4_kernels ops that run during `call`, in order."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            namespace, _, name = func._schema.name.partition("::")
            if namespace == "mnv4_kernels":
                self.names.append(name)
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        call()
    return recorder.names
