"""The training ops: their formulas, their gradients against float64, layouts, autocast and contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import (
    CALLS,
    Training,
    assert_as_exact_as,
    by_references,
    differentiable,
    op_of,
    plain,
    results_and_gradients,
    widened,
)

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.ops.layout import is_channels_last
from mnv4_kernels.testing import LAYOUTS, cases, forced_tier, tiers

SMALL = (
    Training("bn_act_dwconv", 5, (6, 5), stride=2, padding=(1, 1, 0, 1), act="silu"),
    Training("bn_act_conv", 4, (5, 6), 3, kernel=(3, 2), stride=2, padding=(1, 0, 1, 1), act="gelu"),
    Training("bn_act_pwconv", 4, (4, 3), 5, act="hard_swish"),
    Training("bn_act", 4, (3, 4), act="gelu_tanh"),
    Training("bn_act_dwconv", 3, (4, 4), norm=False, act="none", moments=False),
    Training("bn_act", 3, (3, 3), affine=False, extras=False, act="silu"),
)


class TestFormulas:
    @pytest.mark.parametrize("call", SMALL, ids=str)
    def test_the_backward_is_the_derivative_of_the_forward(self, call: Training) -> None:
        arguments = call.arguments(torch.float64)
        leaves = differentiable(arguments)

        def function(*values: torch.Tensor) -> Any:
            given = list(arguments)
            for index, value in zip(leaves, values, strict=True):
                given[index] = value
            found = by_references(call)(*given)
            return tuple(result for result in found if result.numel()) if isinstance(found, tuple) else found

        inputs = [arguments[index].detach().requires_grad_() for index in leaves]
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_each_activation_has_its_derivative(self, act: str) -> None:
        call = Training("bn_act", 3, (4, 4), act=act)
        arguments = widened(call.arguments())
        _, ours = results_and_gradients(by_references(call), arguments)
        _, torchs = results_and_gradients(plain(call), arguments)
        for mine, theirs in zip(ours, torchs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)

    def test_the_moments_are_those_of_the_result(self) -> None:
        call = Training("bn_act_pwconv", 16, (9, 9), 24)
        z, mean, var = op_of(call)(*call.arguments())
        torch.testing.assert_close(mean, z.mean((0, 2, 3)))
        torch.testing.assert_close(var, z.var((0, 2, 3), correction=0))

    def test_a_network_of_ops_is_convolutions_and_batch_norms(self) -> None:
        """dwconv -> bn -> relu -> 1x1 -> bn -> skip: every gradient is that of torch's own modules in train mode."""
        x, dw, pw = (torch.randn(s) for s in ((3, 8, 9, 9), (8, 1, 3, 3), (8, 8, 1, 1)))
        vectors = [torch.rand(8) + 0.5 for _ in range(4)]
        leaves = [value.requires_grad_() for value in (x, dw, pw, *vectors)]
        ops = torch.ops.mnv4_kernels
        raw, nothing = (None, None, None, None, 0.0, "none"), (None, None)
        z, mean, var = ops.bn_act_dwconv(x, *raw, dw, [1, 1], [1, 1, 1, 1], [1, 1], True)
        z, *moments = ops.bn_act_pwconv(z, mean, var, *vectors[:2], 1e-5, "relu", pw, True)
        ours = ops.bn_act(z, *moments, *vectors[2:], 1e-5, "none", *nothing, x)
        y = torch.nn.functional.conv2d(x, dw, padding=1, groups=8)
        y = torch.nn.functional.batch_norm(y, None, None, *vectors[:2], True).relu()
        y = torch.nn.functional.conv2d(y, pw)
        eager = torch.nn.functional.batch_norm(y, None, None, *vectors[2:], True) + x
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
        weights = torch.randn_like(eager)
        for mine, theirs in zip(
            torch.autograd.grad(ours, leaves, weights), torch.autograd.grad(eager, leaves, weights), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


class TestAgainstFloat64:
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("call", CALLS, ids=str)
    def test_results_and_gradients_are_as_exact_as_plain_torch(self, call: Training, layout: str) -> None:
        arguments = call.arguments(layout=layout)
        ours = results_and_gradients(op_of(call), arguments)
        baseline = results_and_gradients(plain(call), arguments)
        exact = results_and_gradients(plain(call), widened(arguments))
        assert_as_exact_as(ours, baseline, exact)

    @pytest.mark.parametrize("call", CALLS, ids=str)
    def test_so_they_are_on_every_instruction_set(self, call: Training) -> None:
        arguments = call.arguments(layout="channels_last")
        baseline = results_and_gradients(plain(call), arguments)
        exact = results_and_gradients(plain(call), widened(arguments))
        for tier in tiers():
            with forced_tier(tier):
                assert_as_exact_as(results_and_gradients(op_of(call), arguments), baseline, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("call", CALLS[::3], ids=str)
    def test_low_precision_keeps_float32_sums(self, call: Training, dtype: torch.dtype) -> None:
        arguments = call.arguments(dtype, "channels_last")
        ours = results_and_gradients(op_of(call), arguments)
        baseline = results_and_gradients(plain(call), arguments)
        exact = results_and_gradients(plain(call), widened(arguments))
        assert_as_exact_as(ours, baseline, exact, dtype)

    def test_a_mean_far_from_zero_costs_no_digits(self) -> None:
        call = Training("bn_act_pwconv", 16, (12, 12), 32, act="none")
        arguments = call.arguments(layout="channels_last", centre=100.0)
        ours = results_and_gradients(op_of(call), arguments)
        baseline = results_and_gradients(plain(call), arguments)
        exact = results_and_gradients(plain(call), widened(arguments))
        assert_as_exact_as(ours, baseline, exact)


class TestContract:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("call", SMALL[:4], ids=str)
    def test_opcheck_passes_in_every_layout(self, call: Training, layout: str) -> None:
        torch.library.opcheck(op_of(call), tuple(call.arguments(layout=layout)))

    @pytest.mark.parametrize("call", SMALL, ids=str)
    def test_opcheck_passes_with_gradients(self, call: Training) -> None:
        arguments = call.arguments(layout="channels_last")
        for index in differentiable(arguments):
            arguments[index].requires_grad_()
        torch.library.opcheck(op_of(call), tuple(arguments))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
    @pytest.mark.parametrize("call", SMALL, ids=str)
    def test_results_and_gradients_of_maps_lie_as_the_input_does(self, call: Training, layout: str) -> None:
        arguments = call.arguments(layout=layout)
        (z, *_), (dx, *_) = results_and_gradients(op_of(call), arguments)
        nhwc = is_channels_last(arguments[0])
        assert z.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        assert dx.is_contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    def test_only_what_is_asked_for_gets_a_gradient(self) -> None:
        call = SMALL[0]
        arguments = call.arguments()
        arguments[7].requires_grad_()
        op_of(call)(*arguments)[0].sum().backward()
        assert arguments[7].grad is not None
        assert all(arguments[index].grad is None for index in range(5))

    @pytest.mark.parametrize("call", SMALL[:4], ids=str)
    def test_a_second_derivative_is_refused_in_words(self, call: Training) -> None:
        arguments = call.arguments()
        x = arguments[0].requires_grad_()
        found = op_of(call)(*arguments)
        y = found[0] if isinstance(found, tuple) else found
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            grad.sum().backward()

    @pytest.mark.parametrize("call", SMALL[:4], ids=str)
    def test_autocast_casts_maps_and_weights_and_leaves_vectors(self, call: Training) -> None:
        arguments = call.arguments()
        leaves = differentiable(arguments)
        for index in leaves:
            arguments[index].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = op_of(call)(*arguments)
        results = found if isinstance(found, tuple) else (found,)
        assert results[0].dtype == torch.bfloat16
        assert all(result.dtype == torch.float32 for result in results[1:])
        sum(result.float().square().sum() for result in results).backward()
        assert all(arguments[index].grad.dtype == torch.float32 for index in leaves)

    def test_what_is_kept_for_the_backward_is_the_raw_input_and_the_raw_result(self) -> None:
        """The result is the next op's input: a chain keeps one map a convolution, where eager keeps two."""
        kept: list[torch.Tensor] = []
        call = Training("bn_act_dwconv", 8, (6, 6))
        arguments = call.arguments()
        arguments[0].requires_grad_()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z, _, _ = op_of(call)(*arguments)
        maps = {tensor.data_ptr() for tensor in kept if tensor.dim() == 4 and tensor.shape[1] == 8}
        assert maps == {arguments[0].data_ptr(), z.data_ptr()}


#: one block of rows and several, several parts of an image's rows, tails of keys and depths, more keys than usual
ATTENTION = (
    cases.mqa(1, 1, 1, 1, (1, 1)),
    cases.mqa(4, 64, 64, 16, (8, 8)),
    cases.mqa(8, 48, 48, 36, (12, 12), batch=2),
    cases.mqa(3, 17, 15, 13, (5, 7)),
    cases.mqa(2, 8, 33, 100, (9, 3), sharpness=20.0),
    cases.mqa(4, 16, 16, 300, (3, 3), batch=3),
)


class TestAttention:
    @pytest.mark.parametrize("layout", ["contiguous", "sliced_channels_last"])
    @pytest.mark.parametrize("case", ATTENTION, ids=str)
    def test_gradients_are_as_exact_as_plain_torch_on_every_instruction_set(
        self, case: cases.Case, layout: str
    ) -> None:
        arguments = list(case.arguments(layout=layout))
        baseline = results_and_gradients(REFERENCES["mqa"], arguments)
        exact = results_and_gradients(REFERENCES["mqa"], widened(arguments))
        for tier in tiers():
            with forced_tier(tier):
                assert_as_exact_as(results_and_gradients(torch.ops.mnv4_kernels.mqa, arguments), baseline, exact)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_keeps_float32_sums(self, dtype: torch.dtype) -> None:
        arguments = list(ATTENTION[2].arguments(dtype, "channels_last"))
        ours = results_and_gradients(torch.ops.mnv4_kernels.mqa, arguments)
        baseline = results_and_gradients(REFERENCES["mqa"], arguments)
        assert_as_exact_as(ours, baseline, results_and_gradients(REFERENCES["mqa"], widened(arguments)), dtype)

    def test_the_thread_count_changes_no_bit(self) -> None:
        arguments = list(ATTENTION[2].arguments(layout="channels_last"))
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results_and_gradients(torch.ops.mnv4_kernels.mqa, arguments)[1])
        for other in found[1:]:
            assert all(torch.equal(value, again) for value, again in zip(found[0], other, strict=True))

    def test_a_gradient_of_another_shape_is_named(self) -> None:
        query, key, value, heads, scale = ATTENTION[1].arguments()
        with pytest.raises(RuntimeError, match="`grad` must have the result's shape"):
            torch.ops.mnv4_kernels.mqa_backward(query[:, :-1], query, key, value, heads, scale)

    def test_an_empty_batch_has_empty_gradients(self) -> None:
        query, key, value, heads, scale = ATTENTION[1].arguments()
        found = torch.ops.mnv4_kernels.mqa_backward(query[:0], query[:0], key[:0], value[:0], heads, scale)
        assert [gradient.shape[0] for gradient in found] == [0, 0, 0]
