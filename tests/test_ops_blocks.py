"""Whole blocks as ops, `uib` and `mobile_attention`: on a CPU a program of the engine over the caller's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import needs_engine
from models import assert_as_exact

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.support import backends_of
from mnv4_kernels.testing import (
    FUSED,
    KNOWN_TIERS,
    LAYOUTS,
    Case,
    baseline,
    exact,
    forced_tier,
    fused,
    poisoned_memory,
    tiers,
)

pytestmark = needs_engine

BLOCKS = tuple(case for case in FUSED if case.op in ("uib", "mobile_attention"))
FIRST = [next(case for case in BLOCKS if case.op == op) for op in ("uib", "mobile_attention")]


def op_of(case: Case) -> Any:
    return getattr(torch.ops.mnv4_kernels, case.op).default


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_opcheck_passes_in_every_layout(case: Case, layout: str) -> None:
    torch.library.opcheck(op_of(case), case.arguments(layout=layout))


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_the_engine_takes_the_call_and_says_so(case: Case) -> None:
    assert backends_of(case.op)[0].name == "cpp"
    assert backends_of(case.op)[0].reasons(*case.arguments()) == []
    (reason, *_) = backends_of(case.op)[0].reasons(*case.arguments(torch.float64))
    assert "float64" in reason


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tier", KNOWN_TIERS)
def test_the_error_is_within_budget(tier: str, dtype: torch.dtype, layout: str) -> None:
    if tier not in tiers():
        pytest.skip(f"tier {tier} is not among those of this machine and build: {', '.join(tiers())}")
    for case in BLOCKS:
        arguments = case.arguments(dtype, layout)
        with forced_tier(tier), poisoned_memory(), torch.no_grad():
            y = op_of(case)(*arguments)
        # norms: the largest of a few hundred errors is chance where three sums follow each other
        assert_as_exact(y, *baseline(case.op, arguments), *exact(case.op, arguments))
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_float64_is_the_references(case: Case) -> None:
    arguments = case.arguments(torch.float64)
    torch.testing.assert_close(op_of(case)(*arguments), REFERENCES[case.op](*arguments))


@pytest.mark.parametrize("case", BLOCKS[::3], ids=str)
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    found = []
    for call in (op_of(case), REFERENCES[case.op]):
        arguments = tuple(v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in case.arguments())
        call(*arguments).square().sum().backward()
        found.append([value.grad for value in arguments if isinstance(value, torch.Tensor)])
    for ours, theirs in zip(*found, strict=True):
        # both are the reference's formula; the loss's own gradient differs by the forward's rounding
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_an_edit_of_a_weight_is_seen(case: Case) -> None:
    arguments = list(case.arguments())
    with torch.no_grad():
        before = op_of(case)(*arguments)
        tensors = [index for index, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
        for index in tensors[1:]:
            changed = arguments[index].clone()
            arguments[index].mul_(1.5)
            after = op_of(case)(*arguments)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, REFERENCES[case.op](*arguments), rtol=1e-4, atol=1e-4)
            arguments[index].copy_(changed)
        assert torch.equal(op_of(case)(*arguments), before)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_an_empty_batch_gives_an_empty_result(case: Case) -> None:
    x, *others = case.arguments()
    y = op_of(case)(x[:0], *others)
    assert y.shape == REFERENCES[case.op](x[:0], *others).shape


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_tensor_of_the_wrong_shape_is_an_error_that_names_it(case: Case) -> None:
    names = [argument.name for argument in op_of(case)._schema.arguments]
    for index, value in enumerate(case.arguments()):
        if index == 0 or not isinstance(value, torch.Tensor):
            continue
        arguments = list(case.arguments())
        arguments[index] = torch.cat([value, value])
        with pytest.raises(ValueError, match=r"must be \[.*\] on cpu, got"):
            op_of(case)(*arguments)
        assert names[index]


def test_a_skip_over_a_stride_is_an_error() -> None:
    arguments = list(fused.uib(16, 32, 16, (8, 8), stride=2).arguments())
    arguments[-1] = True
    with pytest.raises(ValueError, match="`x` must be"):
        op_of(FIRST[0])(*arguments)


def test_another_scale_than_the_engines_is_the_references() -> None:
    arguments = list(FIRST[1].arguments())
    arguments[-2] *= 3.0
    (reason,) = backends_of("mobile_attention")[0].reasons(*arguments)
    assert "root" in reason
    with torch.no_grad():
        y = op_of(FIRST[1])(*arguments)
    torch.testing.assert_close(y, REFERENCES["mobile_attention"](*arguments))
