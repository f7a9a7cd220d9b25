"""Calls of the training ops, and what their gradients are measured against."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from mnv4_kernels.ops._contract import FORMULAS, REFERENCES, differentiable_by
from mnv4_kernels.testing import lay_out


@dataclasses.dataclass(frozen=True)
class Training:
    """One call of a training op, drawn on demand."""

    op: str
    channels: int
    size: tuple[int, int]
    filters: int = 0
    batch: int = 2
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: int = 1
    act: str = "relu"
    norm: bool = True
    affine: bool = True
    moments: bool = True
    #: of bn_act: layer scale, stochastic depth, residual
    extras: bool = True

    def __str__(self) -> str:
        kernel = "" if self.op in ("bn_act", "bn_act_pwconv") else f"_k{self.kernel[0]}x{self.kernel[1]}s{self.stride}"
        dilated = "" if self.dilation == 1 else f"d{self.dilation}"
        shape = f"n{self.batch}c{self.channels}k{self.filters}_{self.size[0]}x{self.size[1]}"
        flags = "".join(
            f"_{name}"
            for name, off in (
                ("raw", not self.norm), ("plain", not self.affine), ("no_moments", not self.moments),
                ("no_extras", not self.extras),
            )
            if off
        )  # fmt: skip
        return f"{self.op}-{shape}{kernel}{dilated}_{self.act}{flags}"

    def arguments(
        self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0, centre: float = 0.5
    ) -> list[Any]:
        """The op's positional arguments; means lie around `centre`."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        small = torch.float64 if dtype == torch.float64 else torch.float32
        count = self.channels
        x = lay_out((normal(self.batch, count, *self.size) + centre).to(dtype), layout)
        norm: list[Any] = [None] * 4
        if self.norm:
            norm = [(normal(count) * 0.3 + centre).to(small), (normal(count).abs() + 0.3).to(small), None, None]
        if self.norm and self.affine:
            norm[2:] = [(normal(count) * 0.5 + 1).to(small), normal(count).to(small)]
        head = [x, *norm, 1e-3, self.act]
        if self.op == "bn_act":
            if not self.extras:
                return [*head, None, None, None]
            keep = (torch.arange(self.batch) % 2 * 2).to(small)
            residual = lay_out(normal(self.batch, count, *self.size).to(dtype), layout)
            return [*head, normal(count).to(small), keep, residual]
        if self.op == "bn_act_pwconv":
            return [*head, (normal(self.filters, count, 1, 1) / count**0.5).to(dtype), self.moments]
        rows, columns = (count, 1) if self.op == "bn_act_dwconv" else (self.filters, count)
        fan = columns * self.kernel[0] * self.kernel[1]
        weight = (normal(rows, columns, *self.kernel) / fan**0.5).to(dtype)
        geometry = [[self.stride] * 2, list(self.padding), [self.dilation] * 2]
        return [*head, weight, *geometry, self.moments]


def op_of(call: Training) -> Any:
    """The op."""
    return getattr(torch.ops.mnv4_kernels, call.op).default


def differentiable(arguments: list[Any]) -> list[int]:
    """Where the arguments are that get gradients: all floating-point tensors but `keep`."""
    found = [index for index, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
    return [index for index in found if not (len(arguments) == 10 and index == 8)]


def results_and_gradients(
    op: Any, arguments: list[Any], seed: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(results, gradients of every differentiable argument) under random weights of the results."""
    arguments = list(arguments)
    leaves = differentiable(arguments)
    for index in leaves:
        arguments[index] = arguments[index].detach().requires_grad_()
    found = op(*arguments)
    results = [result for result in (found if isinstance(found, tuple) else (found,)) if result.numel()]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    given = [weight.to(result) for weight, result in zip(weights, results, strict=True)]
    grads = torch.autograd.grad(results, [arguments[index] for index in leaves], given)
    return [result.detach() for result in results], list(grads)


def by_references(call: Training) -> Any:
    """The op's two references, one the other's backward, under the op's own autograd formula: runs in float64."""
    return differentiable_by(REFERENCES[call.op], REFERENCES[f"{call.op}_backward"], FORMULAS[call.op])


def plain(call: Training) -> Any:
    """The op's reference, differentiated by torch's own formulas."""
    return REFERENCES[call.op]


#: roundings on the way to the gradient of a variance: normalisation, derivative, two products, factors, sums
ROUNDINGS = 16


def assert_as_exact_as(mine: Any, theirs: Any, true: Any, dtype: torch.dtype = torch.float32) -> None:
    """Each tensor's error against float64, as a norm, is at most twice plain torch's plus a rounding band.

    Args:
        mine, theirs, true: (results, gradients) of the op, of plain torch, and of plain torch in float64.
        dtype: what the maps are rounded to, and with them whatever is computed of them.
    """
    for group, others, exacts in zip(mine, theirs, true, strict=True):
        for index, (got, plain_one, exact) in enumerate(zip(group, others, exacts, strict=True)):
            assert got.shape == plain_one.shape == exact.shape
            assert got.dtype == plain_one.dtype
            error, earned = ((value.double() - exact).norm().item() for value in (got, plain_one))
            band = math.sqrt(ROUNDINGS) * torch.finfo(dtype).eps / 2 * exact.norm().item()
            assert error <= 2 * (earned + band), f"tensor {index}: error {error:.3g}, plain {earned:.3g}, {band:.3g}"


def widened(arguments: list[Any]) -> list[Any]:
    """The same values in float64."""
    return [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]


def check(
    op: Any, call: Training, dtype: torch.dtype = torch.float32, layout: str = "channels_last", centre: float = 0.5
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results and gradients of `op`, once they are as exact as plain torch's."""
    arguments = call.arguments(dtype, layout, centre=centre)
    ours = results_and_gradients(op, arguments)
    baseline = results_and_gradients(plain(call), arguments)
    exact = results_and_gradients(plain(call), widened(arguments))
    assert_as_exact_as(ours, baseline, exact, dtype)
    return ours


#: each edge once: channel tails, odd and oblong maps, maps of one pixel, kernels, paddings, every activation
CALLS: tuple[Training, ...] = (
    Training("bn_act_dwconv", 1, (7, 5)),
    Training("bn_act_dwconv", 3, (8, 11), stride=2, padding=(0, 1, 0, 1), act="relu6"),
    Training("bn_act_dwconv", 16, (14, 14), kernel=(5, 5), padding=(2, 2, 2, 2), act="hard_swish"),
    Training("bn_act_dwconv", 17, (9, 13), kernel=(5, 5), stride=2, padding=(2, 2, 2, 2), act="silu"),
    Training("bn_act_dwconv", 40, (16, 16), kernel=(3, 3), stride=2, act="gelu", batch=3),
    Training("bn_act_dwconv", 24, (12, 7), dilation=2, padding=(2, 2, 2, 2), act="gelu_tanh"),
    Training("bn_act_dwconv", 32, (7, 7), kernel=(7, 7), padding=(3, 3, 3, 3), act="none", norm=False),
    Training("bn_act_dwconv", 16, (6, 8), kernel=(3, 5), padding=(2, 0, 1, 3), affine=False, moments=False),
    Training("bn_act_dwconv", 64, (28, 28), kernel=(5, 5), stride=2, padding=(2, 2, 2, 2), batch=3),
    Training("bn_act_dwconv", 16, (1, 1), kernel=(5, 5), padding=(2, 2, 2, 2)),
    Training("bn_act_dwconv", 24, (9, 9), stride=3, padding=(0, 0, 0, 0)),
    Training("bn_act_pwconv", 1, (3, 5), 1),
    Training("bn_act_pwconv", 16, (14, 14), 64, act="gelu"),
    Training("bn_act_pwconv", 17, (5, 13), 40, act="silu", batch=3),
    Training("bn_act_pwconv", 96, (7, 7), 33, act="hard_swish", moments=False),
    Training("bn_act_pwconv", 64, (8, 8), 96, act="none", norm=False, batch=3),
    Training("bn_act_pwconv", 24, (20, 21), 24, affine=False, act="relu6"),
    Training("bn_act_pwconv", 40, (1, 1), 15, act="gelu_tanh", batch=4),
    Training("bn_act_pwconv", 80, (16, 16), 48, batch=5),
    Training("bn_act_conv", 3, (17, 15), 16, stride=2, act="none", norm=False),
    Training("bn_act_conv", 4, (9, 12), 20, stride=2, dilation=2, padding=(2, 2, 2, 2), act="silu"),
    Training("bn_act_conv", 32, (14, 14), 48, stride=2),
    Training("bn_act_conv", 17, (9, 7), 33, stride=2, padding=(0, 1, 0, 1), act="hard_swish", batch=3),
    Training("bn_act_conv", 24, (8, 8), 15, dilation=2, padding=(2, 2, 2, 2), act="gelu"),
    Training("bn_act_conv", 16, (10, 6), 16, kernel=(3, 5), padding=(2, 0, 1, 3), act="silu", moments=False),
    Training("bn_act", 1, (3, 4)),
    Training("bn_act", 17, (6, 5), act="gelu", batch=3),
    Training("bn_act", 64, (14, 14), act="hard_swish", extras=False),
    Training("bn_act", 40, (9, 9), norm=False, act="none"),
    Training("bn_act", 33, (7, 7), affine=False, act="silu"),
)
