"""Every op keeps its contract: opcheck, strides, autocast, gradients, whatever the layout and the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mnv4_kernels import functional as mk
from mnv4_kernels.backends import native
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.testing import CASES, LAYOUTS, Case, assert_within_budget, cases, outputs

OPS = sorted({case.op for case in CASES})

#: two small calls of each op, between them with every optional argument given and absent
SMALL = (
    cases.dwconv(17, (6, 7), kernel=(5, 5), stride=2, act="hard_swish", batch=2),
    cases.dwconv(8, (5, 5), padding=(0, 1, 2, 1), affine=False),
    cases.conv(3, 17, (7, 6), stride=2, act="relu", channels_last=True, batch=2),
    cases.conv(8, 16, (5, 5), dilation=2, affine=False),
    cases.pwconv(17, 24, (5, 4), act="gelu", gamma=True, residual=True, batch=2),
    cases.pwconv(8, 16, (5, 5), affine=False),
    cases.kv_downsample(17, 16, 8, (6, 5), batch=2),
    cases.kv_downsample(8, 16, 16, (3, 3), kernel=None, affine=False),
    cases.mqa(3, 8, 5, 7, (4, 3), batch=2),
    cases.mqa(1, 16, 16, 4, (2, 2)),
    cases.head(17, 24, 10, (3, 4), batch=2),
    cases.head(8, 16, None, (2, 2), affine=False),
)


def op_of(case: Case) -> Any:
    return getattr(torch.ops.mnv4_kernels, case.op).default


def with_grad(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments)


class TestOpcheck:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("case", SMALL[::2], ids=str)
    def test_opcheck_passes_in_every_layout(self, case: Case, layout: str) -> None:
        torch.library.opcheck(op_of(case), case.arguments(layout=layout))

    @pytest.mark.parametrize("case", SMALL, ids=str)
    def test_opcheck_passes_with_inputs_that_require_gradients(self, case: Case) -> None:
        torch.library.opcheck(op_of(case), with_grad(case.arguments(layout="channels_last")))

    @pytest.mark.parametrize("case", SMALL[1::2], ids=str)
    def test_opcheck_passes_in_low_precision(self, case: Case) -> None:
        torch.library.opcheck(op_of(case), case.arguments(torch.bfloat16))

    def test_opcheck_passes_for_prepack(self) -> None:
        if not native.available():
            pytest.skip("; ".join(native.reasons()))
        for weight, depthwise in ((torch.randn(17, 1, 3, 3), True), (torch.randn(17, 5, 3, 3), False)):
            torch.library.opcheck(torch.ops.mnv4_kernels.prepack.default, (weight, depthwise))


class TestResults:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_fake_has_the_shape_dtype_and_strides_of_the_result(
        self, case: Case, dtype: torch.dtype, layout: str
    ) -> None:
        arguments = case.arguments(dtype, layout)
        real = outputs(op_of(case)(*arguments))
        with FakeTensorMode() as mode:
            fake = outputs(op_of(case)(*(_as_fake(mode, value) for value in arguments)))
        for got, wanted in zip(real, fake, strict=True):
            assert got.shape == wanted.shape
            assert got.dtype == wanted.dtype
            assert _significant_strides(got) == _significant_strides(wanted)

    @pytest.mark.parametrize("case", SMALL, ids=str)
    def test_a_result_is_fresh_memory(self, case: Case) -> None:
        arguments = case.arguments()
        before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
        inputs = [value for value in arguments if isinstance(value, torch.Tensor)]
        storages = {value.untyped_storage().data_ptr() for value in inputs}
        for result in outputs(op_of(case)(*arguments)):
            assert result.untyped_storage().data_ptr() not in storages
            result.fill_(7)
        assert all(map(torch.equal, inputs, before))

    @pytest.mark.parametrize("case", [case for case in SMALL if case.op not in ("head", "kv_downsample")], ids=str)
    def test_nhwc_in_is_nhwc_out(self, case: Case) -> None:
        result = op_of(case)(*case.arguments(layout="channels_last"))
        assert result.is_contiguous(memory_format=torch.channels_last)

    def test_the_stem_writes_nhwc_from_an_nchw_image(self) -> None:
        case = cases.conv(3, 16, (8, 8), stride=2, channels_last=True)
        assert op_of(case)(*case.arguments()).is_contiguous(memory_format=torch.channels_last)


class TestAutocast:
    @pytest.mark.parametrize("case", SMALL, ids=str)
    def test_autocast_casts_activations_and_weights_and_nothing_else(self, case: Case) -> None:
        arguments = case.arguments()
        with torch.autocast("cpu", torch.bfloat16):
            results = outputs(op_of(case)(*arguments))
        # a case draws the same values in every dtype, and its scales stay float32
        expected = outputs(op_of(case)(*case.arguments(torch.bfloat16)))
        for got, wanted in zip(results, expected, strict=True):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, wanted)

    @pytest.mark.parametrize("case", SMALL[::2], ids=str)
    def test_gradients_under_autocast_have_the_dtypes_of_their_leaves(self, case: Case) -> None:
        arguments = with_grad(case.arguments())
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(result.float().square().sum() for result in outputs(op_of(case)(*arguments)))
        loss.backward()
        for value in arguments:
            if isinstance(value, torch.Tensor):
                assert value.grad is not None
                assert value.grad.dtype == value.dtype
                assert value.grad.isfinite().all()


class TestGradients:
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("case", SMALL, ids=str)
    def test_gradients_are_as_near_to_float64_as_the_references_own(self, case: Case, layout: str) -> None:
        ours = _gradients(op_of(case), case.arguments(layout=layout))
        baseline = _gradients(REFERENCES[case.op], case.arguments(layout=layout))
        exact = _gradients(REFERENCES[case.op], _double(case.arguments(layout=layout)))
        assert len(ours) == sum(isinstance(value, torch.Tensor) for value in case.arguments())
        for got, plain, wanted in zip(ours, baseline, exact, strict=True):
            assert_within_budget(got, plain, wanted)

    def test_only_what_is_asked_for_gets_a_gradient(self) -> None:
        x, weight, scale, *others = SMALL[0].arguments()
        weight.requires_grad_()
        op_of(SMALL[0])(x, weight, scale, *others).sum().backward()
        assert weight.grad is not None
        assert x.grad is None
        assert scale.grad is None

    def test_one_unused_result_of_two_is_no_obstacle(self) -> None:
        case = cases.kv_downsample(8, 16, 16, (4, 4))
        arguments = with_grad(case.arguments())
        key, _ = op_of(case)(*arguments)
        key.sum().backward()
        assert arguments[1].grad is not None
        assert arguments[5].grad is None or not arguments[5].grad.any()


class TestOpErrors:
    """The raw ops check too: they are public, and a kernel must never read past a tensor."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        if not native.available():
            pytest.skip("; ".join(native.reasons()))

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({0: torch.randn(8, 5, 5)}, "x"),
            ({0: torch.randn(1, 8, 5, 5, dtype=torch.float64)}, "x"),
            ({1: torch.randn(7, 1, 3, 3)}, "weight"),
            ({1: torch.randn(8, 2, 3, 3)}, "weight"),
            ({2: torch.randn(7)}, "scale"),
            ({3: torch.randn(9)}, "shift"),
            ({4: [0, 1]}, "stride"),
            ({4: [1]}, "stride"),
            ({5: [1, 1]}, "padding"),
            ({5: [-1, 1, 1, 1]}, "padding"),
            ({6: [0, 0]}, "dilation"),
            ({6: [9, 9]}, "weight"),
            ({7: "tanh"}, "act"),
            ({8: torch.randn(3)}, "packed"),
        ],
    )
    def test_a_wrong_argument_of_dwconv_is_named(self, change: dict[int, Any], name: str) -> None:
        arguments = [*cases.dwconv(8, (5, 5)).arguments(), None]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=f"`{name}`"):
            torch.ops.mnv4_kernels.dwconv_bn_act(*arguments)

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({0: torch.randn(17, 5, 4)}, "x"),
            ({1: torch.randn(24, 16, 1, 1)}, "weight"),
            ({1: torch.randn(24, 17, 3, 3)}, "weight"),
            ({2: torch.randn(17)}, "scale"),
            ({5: torch.randn(17)}, "gamma"),
            ({6: torch.randn(2, 24, 5, 5)}, "residual"),
            ({7: torch.randn(24 * 17)}, "packed"),
        ],
    )
    def test_a_wrong_argument_of_pwconv_is_named(self, change: dict[int, Any], name: str) -> None:
        arguments = [*SMALL[4].arguments(), None]
        for index, value in change.items():
            arguments[index] = value
        with pytest.raises(RuntimeError, match=f"`{name}`"):
            torch.ops.mnv4_kernels.pwconv_bn_act(*arguments)

    def test_wrong_arguments_of_conv_kv_mqa_and_head_are_named(self) -> None:
        ops = torch.ops.mnv4_kernels
        conv, kv, mqa, head = (list(SMALL[index].arguments()) for index in (2, 6, 8, 10))
        with pytest.raises(RuntimeError, match="`weight`"):
            ops.conv_bn_act(conv[0], torch.randn(17, 4, 3, 3), *conv[2:])
        with pytest.raises(RuntimeError, match=r"`(key_)?project`"):
            ops.kv_downsample(*kv[:4], torch.randn(16, 16, 1, 1), *kv[5:])
        with pytest.raises(RuntimeError, match="`key_down` and `value_down`"):
            ops.kv_downsample(kv[0], None, *kv[2:])
        with pytest.raises(RuntimeError, match="`value`"):
            ops.mqa(mqa[0], mqa[1], mqa[2][:, :-1], *mqa[3:])
        with pytest.raises(RuntimeError, match="`query`"):
            ops.mqa(mqa[0][:, :-1], *mqa[1:])
        with pytest.raises(RuntimeError, match="`classifier_weight`"):
            ops.head(*head[:5], torch.randn(10, 23), head[6])


class TestPrepack:
    @pytest.mark.parametrize(
        "case", [case for case in CASES if case.op in ("dwconv_bn_act", "conv_bn_act", "pwconv_bn_act")], ids=str
    )
    def test_packed_and_unpacked_weights_give_the_same_bits(self, case: Case) -> None:
        if not native.available():
            pytest.skip("; ".join(native.reasons()))
        arguments = case.arguments(layout="channels_last")
        packed = mk.prepack(arguments[1], arguments[2], depthwise=case.op == "dwconv_bn_act")
        assert torch.equal(op_of(case)(*arguments, packed), op_of(case)(*arguments))

    def test_packed_attention_and_head_give_the_same_bits(self) -> None:
        if not native.available():
            pytest.skip("; ".join(native.reasons()))
        for case in (SMALL[6], SMALL[7]):
            arguments = case.arguments()
            parts = []
            for down, scale, project in ((*arguments[1:3], arguments[4]), (*arguments[5:7], arguments[8])):
                parts += [] if down is None else [mk.prepack(down, scale, depthwise=True)]
                parts.append(mk.prepack(project))
            packed = op_of(case)(*arguments, torch.cat(parts))
            assert all(map(torch.equal, packed, op_of(case)(*arguments)))
        arguments = SMALL[10].arguments()
        packed, classifier = mk.prepack(arguments[1], arguments[2]), mk.prepack(arguments[5][:, :, None, None])
        assert torch.equal(op_of(SMALL[10])(*arguments, packed, classifier), op_of(SMALL[10])(*arguments))

    def test_a_weight_packs_the_same_from_every_layout(self) -> None:
        if not native.available():
            pytest.skip("; ".join(native.reasons()))
        packed = [
            mk.prepack(cases.conv(17, 33, (5, 5)).arguments(weight_layout=layout)[1])
            for layout in LAYOUTS
            if layout != "expanded"
        ]
        assert all(torch.equal(packed[0], other) for other in packed[1:])


def _gradients(function: Any, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    leaves = [value.requires_grad_() for value in arguments if isinstance(value, torch.Tensor)]
    results = outputs(function(*arguments))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    loss = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves))


def _double(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.double() if isinstance(value, torch.Tensor) else value for value in arguments)


def _as_fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def _significant_strides(x: torch.Tensor) -> list[int]:
    """Strides that say where an element is: none of a dimension of size 1, none of an empty tensor."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]
