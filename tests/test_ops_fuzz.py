"""Shapes, strides, dtypes, layouts and tiers at random, against bounds that hold for every correct kernel.

An earned budget needs many elements to mean something, and a fuzzed result may have one. So
the bound here is the textbook one: a float32 sum of K products, in any order, is off by at
most about K units of the sum of their magnitudes, and the result is then rounded once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnv4_kernels.backends import native
from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.testing import LAYOUTS, Case, cases, exact, forced_tier, outputs, poisoned_memory, tiers

EPS32 = torch.finfo(torch.float32).eps

sizes = st.tuples(st.integers(1, 19), st.integers(1, 19))
channels = st.integers(1, 70)
batches = st.integers(0, 3)
acts = st.sampled_from(sorted(ACTIVATIONS))
flags = st.booleans()


@st.composite
def geometries(draw: st.DrawFn, size: tuple[int, int]) -> dict[str, Any]:
    """Kernel, stride, padding and dilation that leave at least one output pixel."""
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding: Any = "same"
    if draw(flags):
        sides = []
        for length, taps in zip(size, kernel, strict=True):
            before = draw(st.integers(0, 5))
            missing = dilation * (taps - 1) + 1 - length - before
            sides += [before, draw(st.integers(max(0, missing), max(0, missing) + 3))]
        padding = tuple(sides)
    return {"kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}


@st.composite
def dwconvs(draw: st.DrawFn) -> Case:
    size = draw(sizes)
    options = {"batch": draw(batches), "act": draw(acts), "affine": draw(flags)}
    return cases.dwconv(draw(channels), size, **options, **draw(geometries(size)))


@st.composite
def convs(draw: st.DrawFn) -> Case:
    size = draw(sizes)
    options = {"batch": draw(batches), "act": draw(acts), "affine": draw(flags), "channels_last": draw(flags)}
    return cases.conv(draw(st.integers(1, 33)), draw(channels), size, **options, **draw(geometries(size)))


@st.composite
def pwconvs(draw: st.DrawFn) -> Case:
    options = {"affine": draw(flags), "gamma": draw(flags), "residual": draw(flags)}
    return cases.pwconv(draw(channels), draw(channels), draw(sizes), batch=draw(batches), act=draw(acts), **options)


@st.composite
def kv_downsamples(draw: st.DrawFn) -> Case:
    size = draw(sizes)
    geometry = draw(st.one_of(st.just({"kernel": None}), geometries(size)))
    options = {"batch": draw(batches), "affine": draw(flags)}
    return cases.kv_downsample(draw(channels), draw(channels), draw(channels), size, **options, **geometry)


@st.composite
def mqas(draw: st.DrawFn) -> Case:
    heads, key, value, positions = draw(st.integers(1, 5)), draw(channels), draw(channels), draw(st.integers(1, 120))
    return cases.mqa(heads, key, value, positions, draw(sizes), batch=draw(batches))


@st.composite
def heads(draw: st.DrawFn) -> Case:
    classes = draw(st.one_of(st.none(), channels))
    options = {"batch": draw(batches), "act": draw(acts), "affine": draw(flags), "bias": draw(flags)}
    return cases.head(draw(channels), draw(channels), classes, draw(sizes), **options)


CALLS = {
    "dwconv_bn_act": dwconvs(),
    "conv_bn_act": convs(),
    "pwconv_bn_act": pwconvs(),
    "kv_downsample": kv_downsamples(),
    "mqa": mqas(),
    "head": heads(),
}


@pytest.mark.parametrize("op", CALLS)
def test_any_call_is_within_the_error_bound_of_its_sums(op: str) -> None:
    if not native.available():
        pytest.skip("; ".join(native.reasons()))

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(
        case=CALLS[op],
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        layout=st.sampled_from(sorted(LAYOUTS)),
        tier=st.sampled_from(tiers()),
        seed=st.integers(0, 3),
    )
    def check(case: Case, dtype: torch.dtype, layout: str, tier: str, seed: int) -> None:
        arguments = case.arguments(dtype, layout, weight_layout=layout, seed=seed)
        with forced_tier(tier), poisoned_memory(), torch.no_grad():
            actual = outputs(getattr(torch.ops.mnv4_kernels, op)(*arguments))
        fake = outputs(getattr(torch.ops.mnv4_kernels, op)(*_on_meta(arguments)))
        for got, shaped, wanted, bound in zip(actual, fake, exact(op, arguments), bounds(op, arguments), strict=True):
            assert got.shape == shaped.shape == wanted.shape
            assert got.dtype == dtype
            errors = (got.double() - wanted).abs()
            allowed = bound + torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
            assert bool((errors <= allowed).all()), f"off by {(errors / allowed).max().item():.3g} times the bound"

    check()


def bounds(op: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """How far float32 sums may take each element of the results."""
    if op == "mqa":
        return (_attention_bound(*arguments),)
    magnitudes = exact(op, tuple(_magnitude(value) for value in arguments))
    x = arguments[0]
    tensors = [value for value in arguments[1:] if isinstance(value, torch.Tensor) and value.dim() > 1]
    terms = sum(int(value.shape[1:].numel()) for value in tensors)
    if op == "head":
        terms += x.shape[2] * x.shape[3]
    # 16: scale, shift, activation (slope at most 1.13), layer scale and residual, a few roundings each
    return tuple((terms + 16) * EPS32 * value for value in magnitudes)


def _attention_bound(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """Scores are off by Dk units, their exponentials relatively by as much, and the sum has P terms."""
    largest = (query.double().abs().amax() * key.double().abs().amax()).item() if query.numel() else 0.0
    scores = key.shape[2] * EPS32 * key.shape[2] * largest * scale
    magnitude = exact("mqa", (query, key, value.abs(), heads, scale))[0]
    return (4 * scores + (key.shape[1] + 16) * EPS32) * magnitude


def _magnitude(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.abs()
    return "none" if isinstance(value, str) else value


def _on_meta(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments)
