"""Every op on every tier is as near to float64 as the plain computation earns, and gives the same bits each time."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.ops.support import backends_of
from mnv4_kernels.testing import (
    CASES,
    KNOWN_TIERS,
    LAYOUTS,
    Case,
    assert_within_budget,
    baseline,
    cases,
    exact,
    forced_tier,
    outputs,
    poisoned_memory,
    tiers,
)

#: layers of the models, at a size that takes milliseconds
LAYERS = (
    cases.dwconv(96, (28, 28), kernel=(5, 5), padding=(2, 2, 2, 2), act="relu"),
    cases.dwconv(192, (14, 14), batch=3, padding=(1, 1, 1, 1), act="gelu"),
    cases.conv(3, 32, (64, 64), stride=2, padding=(1, 1, 1, 1), act="relu", channels_last=True),
    cases.conv(32, 64, (28, 28), stride=2, padding=(1, 1, 1, 1), act="relu"),
    cases.conv(96, 96, (7, 7), act="relu"),
    cases.pwconv(64, 192, (14, 14), batch=3, act="relu"),
    cases.pwconv(576, 96, (7, 7), gamma=True, residual=True),
    cases.pwconv(960, 960, (7, 7), act="relu"),
    cases.kv_downsample(160, 64, 64, (16, 16)),
    cases.mqa(4, 64, 64, 64, (16, 16)),
    cases.head(960, 1280, 1000, (7, 7), batch=2, act="hard_swish"),
)

FIRST = {op: next(case for case in CASES if case.op == op) for op in sorted({case.op for case in CASES})}


@pytest.fixture(params=KNOWN_TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier of the C++ library, in use while the test runs; skipped where this machine or build lacks it."""
    cpp = next(row for row in backends_of("mqa") if row.name == "cpp")
    if reasons := cpp.reasons(*FIRST["mqa"].arguments()):
        pytest.skip("; ".join(reasons))
    if request.param not in tiers():
        pytest.skip(f"tier {request.param} is not among those of this machine and build: {', '.join(tiers())}")
    with forced_tier(request.param):
        yield request.param


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The baseline and the exact results; the same for all layouts and tiers."""
    arguments = case.arguments(dtype)
    return baseline(case.op, arguments), exact(case.op, arguments)


def run(case: Case, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return outputs(getattr(torch.ops.mnv4_kernels, case.op).default(*arguments))


def assert_right(case: Case, dtype: torch.dtype, layout: str, weight_layout: str = "contiguous") -> None:
    with poisoned_memory():
        actual = run(case, case.arguments(dtype, layout, weight_layout))
    for got, plain, wanted in zip(actual, *expected(case, dtype), strict=True):
        assert_within_budget(got, plain, wanted)


@pytest.mark.usefixtures("tier")
class TestAccuracy:
    @pytest.mark.parametrize(
        ("dtype", "layout"),
        [
            (torch.float32, "contiguous"),
            (torch.float32, "channels_last"),
            (torch.bfloat16, "channels_last"),
            (torch.float16, "contiguous"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_error_is_within_budget(self, case: Case, dtype: torch.dtype, layout: str) -> None:
        assert_right(case, dtype, layout)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", LAYERS, ids=str)
    def test_layers_of_the_models_are_within_budget(self, case: Case, dtype: torch.dtype) -> None:
        assert_right(case, dtype, "channels_last")

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("contiguous", "expanded")])
    @pytest.mark.parametrize("case", CASES[::4], ids=str)
    def test_no_layout_of_activations_or_weights_changes_the_result(self, case: Case, layout: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(case, dtype, layout, weight_layout=layout)

    @pytest.mark.parametrize("case", [FIRST[op] for op in FIRST], ids=str)
    def test_a_batch_expanded_without_memory_is_read_right(self, case: Case) -> None:
        arguments = case.arguments(layout="expanded")
        for got, plain, wanted in zip(
            run(case, arguments), baseline(case.op, arguments), exact(case.op, arguments), strict=True
        ):
            assert_within_budget(got, plain, wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_every_activation_of_every_op_with_one(self, act: str, dtype: torch.dtype) -> None:
        for case in (
            cases.dwconv(33, (9, 7), act=act),
            cases.conv(8, 33, (9, 7), act=act),
            cases.pwconv(17, 33, (9, 7), act=act),
            cases.head(17, 33, None, (3, 3), act=act),
        ):
            assert_right(case, dtype, "channels_last")


@pytest.mark.usefixtures("tier")
class TestSpecialValues:
    @pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("case", [case for case in CASES if "n0" not in case.label][::2], ids=str)
    def test_nan_and_infinity_reach_what_they_reach_in_eager(self, case: Case, special: float) -> None:
        arguments = case.arguments(layout="channels_last")
        x = arguments[0]
        # corners, an edge and the middle: padding must neither swallow nor spread them
        for h, w in ((0, 0), (0, -1), (-1, x.shape[3] // 2), (x.shape[2] // 2, x.shape[3] // 2)):
            x[0, 0, h, w] = special
        for got, plain, wanted in zip(
            run(case, arguments), baseline(case.op, arguments), exact(case.op, arguments), strict=True
        ):
            assert_within_budget(got, plain, wanted)

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_activations_of_extreme_values_are_eagers_in_float32_or_float64(self, act: str) -> None:
        values = [0.0, -0.0, 1e-45, -1e-45, 1e-30, 88.0, 89.0, 1e2, 1e4, 1e19, 1e30, 3e38, float("inf"), float("nan")]
        x = torch.tensor([[sign * value for value in values for sign in (1, -1)]]).view(1, 1, 4, 7)
        y = torch.ops.mnv4_kernels.pwconv_bn_act(x, torch.ones(1, 1, 1, 1), None, None, act, None, None)
        # float32 eager's hard_swish overflows at 3e38, and its gelu makes NaN of inf on some processors: both are
        # allowed to a kernel, and so is the exact value
        eager, exact_ = ACTIVATIONS[act](x), ACTIVATIONS[act](x.double()).float()
        near = [torch.isclose(y, wanted, rtol=1e-6, atol=1e-38, equal_nan=True) for wanted in (eager, exact_)]
        wrong = x[~(near[0] | near[1])]
        assert wrong.numel() == 0, f"{act} is wrong at {wrong.tolist()}"

    def test_denormals_are_kept(self) -> None:
        x = torch.tensor([1e-40, -3e-42, 1.4e-45, 1e-38]).view(1, 4, 1, 1).expand(2, 4, 3, 3).contiguous()
        eye = torch.eye(4).view(4, 4, 1, 1)
        ops = torch.ops.mnv4_kernels
        assert torch.equal(ops.pwconv_bn_act(x, eye, None, None, "none", None, None), x)
        ones, pad = torch.ones(4, 1, 1, 1), [0, 0, 0, 0]
        assert torch.equal(ops.dwconv_bn_act(x, ones, None, None, [1, 1], pad, [1, 1], "relu"), x.relu())
        assert torch.equal(ops.conv_bn_act(x, eye, None, None, [1, 1], pad, [1, 1], "none", False), x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_low_precision_value_survives_a_copy_through_the_kernels(self, dtype: torch.dtype) -> None:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype).view(1, 1, 256, 256)
        y = torch.ops.mnv4_kernels.pwconv_bn_act(x, torch.ones(1, 1, 1, 1, dtype=dtype), None, None, "none", None, None)
        # eager too turns -0 * 1 + 0 into 0, so values are compared and not bits
        assert torch.equal(y.nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))
        assert torch.equal(y.isnan(), x.isnan())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounding_is_to_nearest_even_and_overflow_is_infinite(self, dtype: torch.dtype) -> None:
        x = torch.cat(
            [torch.linspace(-3, 3, 1001), torch.tensor([65519.0, 65520.0, 3.3e38, 3.4e38, 6e-8, 3e-8, 1e-45])]
        )
        # the shift is float32, so that any float32 value reaches the final rounding
        zeros = torch.zeros(1, x.numel(), 1, 1, dtype=dtype)
        weight = torch.zeros(x.numel(), 1, 1, 1, dtype=dtype)
        y = torch.ops.mnv4_kernels.dwconv_bn_act(zeros, weight, None, x, [1, 1], [0] * 4, [1, 1], "none")
        assert torch.equal(y.flatten(), x.to(dtype))

    def test_attention_survives_scores_beyond_the_exponential(self) -> None:
        case = cases.mqa(2, 16, 16, 40, (5, 3), sharpness=1e4)
        assert_right(case, torch.float32, "channels_last")

    def test_attention_to_infinite_scores_is_nan_as_in_eager(self) -> None:
        case = cases.mqa(2, 16, 16, 9, (2, 3))
        query, key, *others = case.arguments()
        key[0, 3, 2] = float("inf")
        arguments = (query, key, *others)
        for got, plain, wanted in zip(
            run(case, arguments), baseline(case.op, arguments), exact(case.op, arguments), strict=True
        ):
            assert_within_budget(got, plain, wanted)


@pytest.mark.usefixtures("tier")
class TestDeterminism:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", [*CASES[::2], *LAYERS], ids=str)
    def test_the_number_of_threads_changes_no_bit(self, case: Case, dtype: torch.dtype) -> None:
        arguments = case.arguments(dtype, "channels_last")
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(case, arguments))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(map(_same_bits, results[0], other))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_memory_format_changes_no_bit(self, case: Case) -> None:
        contiguous, nhwc = (run(case, case.arguments(layout=layout)) for layout in ("contiguous", "channels_last"))
        assert all(map(_same_bits, contiguous, nhwc))

    def test_an_image_of_a_batch_is_what_it_is_alone(self) -> None:
        for case in LAYERS:
            arguments = case.arguments(layout="channels_last")
            if arguments[0].shape[0] < 2:
                continue
            alone = (arguments[0][1:2], *arguments[1:])
            for whole, single in zip(run(case, arguments), run(case, alone), strict=True):
                assert _same_bits(whole[1:2], single)


@pytest.mark.parametrize("k", [256, 320, 496])
def test_a_product_is_as_exact_as_two_even_sums(k: int) -> None:
    """One chain over the whole reduction has an error 1.4 times as large, and eager's by two threads are two sums."""
    x, weight = torch.randn(1, k, 16, 16).contiguous(memory_format=torch.channels_last), torch.randn(64, k, 1, 1)
    found = torch.ops.mnv4_kernels.pwconv_bn_act(x, weight, None, None, "none", None, None)
    rows, columns = x[0].flatten(1).T, weight.flatten(1).T
    sums = []
    for half in (slice(0, k // 2), slice(k // 2, k)):
        total = torch.zeros(len(rows), columns.shape[1])
        for row, column in zip(rows[:, half].T.double(), columns[half].double(), strict=True):
            # a fused multiply-add rounds once
            total = (total.double() + row[:, None] * column).float()
        sums.append(total)
    true = rows.double() @ columns.double()
    error, earned = (found[0].flatten(1).T - true).norm(), (sums[0] + sums[1] - true).norm()
    assert error < 1.1 * earned


def test_concurrent_calls_of_several_python_threads_do_not_meet() -> None:
    todo = [(case, case.arguments(dtype, "channels_last")) for case in LAYERS for dtype in (torch.float32, torch.half)]
    alone = [run(case, arguments) for case, arguments in todo]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda call: run(*call), todo))
            for expected_, actual in zip(alone, together, strict=True):
                assert all(map(_same_bits, expected_, actual))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_of_one_thread_computes_the_same() -> None:
    # one thread: torch's own OpenMP pool doesn't survive a fork either, which is why DataLoader's workers have one
    case = LAYERS[5]
    arguments = case.arguments(layout="channels_last")
    (before,) = run(case, arguments)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(run(case, arguments)[0], before) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
