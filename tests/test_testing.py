"""The helpers that judge the kernels are judged first: each has inputs that it must pass, and that it must fail."""

from __future__ import annotations

import pytest
import torch

from mnv4_kernels import environment, testing
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.support import backends_of
from mnv4_kernels.testing import CASES, FUSED, LAYOUTS, assert_within_budget, error_budget, lay_out, poisoned_memory


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestBudget:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_correct_rounding_is_within_budget(self, exact: torch.Tensor, dtype: torch.dtype) -> None:
        assert_within_budget(exact.to(dtype), exact.to(dtype), exact)

    def test_an_error_of_four_units_in_the_last_place_is_outside(self, exact: torch.Tensor) -> None:
        wrong = exact.float()
        wrong[1, 2, 4, 4] += 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        with pytest.raises(AssertionError, match=r"everywhere: error .* at \(1, 2, 4, 4\)"):
            assert_within_budget(wrong, exact.float(), exact)

    def test_a_wrong_border_is_found_under_a_large_interior(self, exact: torch.Tensor) -> None:
        exact[..., 1:-1, 1:-1] *= 1e6
        wrong = exact.float()
        wrong[..., -1, :] += 1e-3
        with pytest.raises(AssertionError, match="in the last row"):
            assert_within_budget(wrong, exact.float(), exact)

    @pytest.mark.parametrize(
        ("region", "index"),
        [
            ("in the first row", (0, 1)),
            ("in the last row", (-1, 1)),
            ("in the first column", (1, 0)),
            ("in the last column", (1, -1)),
        ],
    )
    def test_each_border_is_looked_at(self, exact: torch.Tensor, region: str, index: tuple[int, int]) -> None:
        exact[..., 3, 3] = 1e6
        wrong = exact.float()
        wrong[..., index[0], index[1]] += 1e-2
        with pytest.raises(AssertionError, match=region):
            assert_within_budget(wrong, exact.float(), exact)

    def test_twice_the_error_of_the_baseline_is_allowed_and_thrice_is_not(self, exact: torch.Tensor) -> None:
        baseline = (exact + 1e-3).float()
        assert_within_budget((exact + 1.9e-3).float(), baseline, exact)
        with pytest.raises(AssertionError, match="above the budget"):
            assert_within_budget((exact + 3e-3).float(), baseline, exact)

    def test_an_exact_baseline_leaves_one_unit_in_the_last_place(self) -> None:
        ones = torch.ones(4, dtype=torch.float64)
        assert error_budget(ones.bfloat16(), ones) == torch.finfo(torch.bfloat16).eps

    def test_nan_where_the_exact_result_is_finite_fails(self, exact: torch.Tensor) -> None:
        wrong = exact.float()
        wrong[0, 0, 0, 0] = float("nan")
        with pytest.raises(AssertionError, match="NaN or infinite where they should not be"):
            assert_within_budget(wrong, exact.float(), exact)

    def test_nan_in_the_baseline_too_earns_nothing(self, exact: torch.Tensor) -> None:
        wrong = exact.float()
        wrong[0, 0, 0, 0] = float("nan")
        with pytest.raises(AssertionError, match="first at"):
            assert_within_budget(wrong, wrong, exact)

    def test_a_finite_value_in_place_of_nan_fails(self, exact: torch.Tensor) -> None:
        actual = exact.float()
        exact[0, 0, 0, 0] = float("nan")
        with pytest.raises(AssertionError, match="first at"):
            assert_within_budget(actual, actual, exact)

    def test_the_wrong_infinity_fails(self, exact: torch.Tensor) -> None:
        exact[0, 0, 0, 0] = float("inf")
        wrong = exact.float()
        wrong[0, 0, 0, 0] = float("-inf")
        with pytest.raises(AssertionError, match="got -inf, expected inf"):
            assert_within_budget(wrong, exact.float(), exact)

    def test_equal_specials_pass(self, exact: torch.Tensor) -> None:
        exact[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        assert_within_budget(exact.float(), exact.float(), exact)

    def test_overflow_of_the_dtype_is_an_infinity(self) -> None:
        exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
        assert_within_budget(exact.half(), exact.half(), exact)

    def test_an_empty_result_is_within_budget(self) -> None:
        empty = torch.empty(0, 3, 4, 4, dtype=torch.float64)
        assert_within_budget(empty.float(), empty.float(), empty)

    def test_tensors_that_do_not_belong_together_are_refused(self, exact: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="one shape"):
            assert_within_budget(exact.float()[:1], exact.float(), exact)
        with pytest.raises(ValueError, match="`exact` float64"):
            assert_within_budget(exact.float(), exact.float(), exact.float())
        with pytest.raises(ValueError, match="`actual`'s dtype"):
            assert_within_budget(exact.float(), exact.half(), exact)


class TestLayouts:
    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4), (3, 4), (0, 3, 4, 5), (2, 1, 1, 1)])
    def test_a_layout_keeps_shape_and_values(self, layout: str, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape)
        y = lay_out(x, layout)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr() or x.numel() == 0

    def test_every_layout_has_strides_of_its_own(self) -> None:
        x = torch.randn(2, 3, 4, 5)
        laid_out = {name: lay_out(x, name) for name in LAYOUTS}
        assert len({(y.stride(), y.storage_offset()) for y in laid_out.values()}) == len(LAYOUTS)

    def test_layouts_are_what_they_are_called(self) -> None:
        x = torch.randn(2, 3, 4, 5)
        assert lay_out(x, "contiguous").is_contiguous()
        assert lay_out(x, "channels_last").is_contiguous(memory_format=torch.channels_last)
        assert lay_out(x, "permuted").stride() == (1, 2, 6, 24)
        assert lay_out(x, "sliced_channels_last").stride(1) == 1
        assert lay_out(x, "strided").stride(3) == 2
        assert lay_out(x, "offset").storage_offset() == 1
        assert lay_out(x, "expanded").stride(0) == 0

    def test_gaps_between_elements_are_nan(self) -> None:
        for layout in ("sliced", "sliced_channels_last", "strided", "offset"):
            y = lay_out(torch.ones(2, 3, 4, 5), layout)
            storage = torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,), 0)
            assert int(storage.isnan().sum()) == storage.numel() - y.numel() > 0, layout

    def test_an_unknown_layout_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"`layout` must be one of contiguous, .*, got 'nchw'"):
            lay_out(torch.ones(1), "nchw")


class TestCases:
    def test_every_op_with_a_cpp_kernel_has_cases(self) -> None:
        names = {op: [row.name for row in backends_of(op)] for op in environment.OPS}
        assert {case.op for case in (*CASES, *FUSED)} >= {op for op in names if "cpp" in names[op]}

    def test_cases_have_names_of_their_own(self) -> None:
        assert len({str(case) for case in CASES}) == len(CASES)

    def test_a_seed_gives_the_same_values_in_every_layout(self) -> None:
        contiguous = CASES[0].arguments(layout="contiguous", seed=3)
        permuted = CASES[0].arguments(layout="permuted", seed=3)
        assert torch.equal(contiguous[0], permuted[0])
        assert not torch.equal(contiguous[0], CASES[0].arguments(seed=4)[0])

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_baseline_is_within_its_own_budget_in_float16(self, case: testing.Case) -> None:
        arguments = case.arguments(torch.float16)
        for got, wanted in zip(testing.baseline(case.op, arguments), testing.exact(case.op, arguments), strict=True):
            assert wanted.dtype == torch.float64
            assert_within_budget(got, got, wanted)

    def test_the_baseline_is_the_worse_of_both_memory_formats(self) -> None:
        case = next(case for case in CASES if case.op == "pwconv_bn_act" and "c384" in case.label)
        contiguous, nhwc = case.arguments(layout="contiguous"), case.arguments(layout="channels_last")
        (wanted,) = testing.exact(case.op, contiguous)
        (worse,) = testing.baseline(case.op, contiguous)
        assert torch.equal(worse, testing.baseline(case.op, nhwc)[0])
        assert (worse - wanted).abs().max() >= (REFERENCES[case.op](*nhwc) - wanted).abs().max()


class TestPoison:
    def test_fresh_memory_is_nan(self) -> None:
        with poisoned_memory():
            x = torch.zeros(3, 4)
            fresh = [torch.empty(5), x.new_empty(5), torch.empty_like(x), torch.empty_strided((2, 3), (3, 1))]
        assert all(bool(value.isnan().all()) for value in fresh)

    def test_it_leaves_torch_as_it_was(self) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="on purpose"), poisoned_memory():
            raise RuntimeError("on purpose")
        assert torch.are_deterministic_algorithms_enabled() == before


class TestTiers:
    def test_a_forced_tier_is_used_and_let_go(self) -> None:
        if not testing.tiers():
            with pytest.raises(RuntimeError, match=r"C\+\+ library .* is not available"), testing.forced_tier("scalar"):
                pass
            return
        from mnv4_kernels.backends import native

        before = native.module().active_tier()
        for name in testing.tiers():
            with testing.forced_tier(name):
                assert native.module().active_tier() == name
        assert native.module().active_tier() == before

    def test_forced_tiers_nest(self) -> None:
        if len(testing.tiers()) < 2:
            pytest.skip("needs two tiers of the C++ library")
        from mnv4_kernels.backends import native

        low, high = testing.tiers()[0], testing.tiers()[-1]
        with testing.forced_tier(low):
            with testing.forced_tier(high):
                assert native.module().active_tier() == high
            assert native.module().active_tier() == low

    def test_an_unknown_tier_is_refused(self) -> None:
        if not testing.tiers():
            pytest.skip("needs the C++ library")
        with (
            pytest.raises(ValueError, match=r"`name` must be one of scalar, .*, got 'sse9'"),
            testing.forced_tier("sse9"),
        ):
            pass
