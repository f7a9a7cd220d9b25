"""The public functions: what they compute, what they accept, how they refuse, and where they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functional_calls import CALLS, REFUSALS, randn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mnv4_kernels import environment, ops
from mnv4_kernels import functional as mk
from mnv4_kernels.backends import native
from mnv4_kernels.ops.activation import ACTIVATIONS

MODULES = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hard_swish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, dtype=torch.float64).eval()
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.1, 3.0)
    return norm


def fold(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    return mk.fold_batch_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


class TestAgainstModules:
    """In float64 the functions are torch's own modules, to rounding: nothing but the formula is tested."""

    @pytest.mark.parametrize("act", MODULES)
    def test_depthwise_convolution_norm_and_activation(self, act: str) -> None:
        conv = nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6, bias=False, dtype=torch.float64)
        norm, x = batch_norm(6), torch.randn(2, 6, 9, 8, dtype=torch.float64)
        y = mk.dwconv_bn_act(x, conv.weight, *fold(norm), stride=2, padding=2, act=act)
        torch.testing.assert_close(y, MODULES[act](norm(conv(x))))

    @pytest.mark.parametrize("act", MODULES)
    def test_pointwise_convolution_norm_activation_layer_scale_and_residual(self, act: str) -> None:
        conv = nn.Conv2d(6, 10, 1, bias=False, dtype=torch.float64)
        norm, x = batch_norm(10), torch.randn(2, 6, 5, 4, dtype=torch.float64)
        gamma, residual = torch.randn(10).double(), torch.randn(2, 10, 5, 4, dtype=torch.float64)
        y = mk.pwconv_bn_act(x, conv.weight, *fold(norm), act=act, gamma=gamma, residual=residual)
        torch.testing.assert_close(y, MODULES[act](norm(conv(x))) * gamma.view(1, -1, 1, 1) + residual)

    def test_a_bias_is_a_shift(self) -> None:
        conv = nn.Conv2d(6, 10, 1, dtype=torch.float64)
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(mk.pwconv_bn_act(x, conv.weight, shift=conv.bias), conv(x))

    def test_dense_convolution_with_dilation(self) -> None:
        conv = nn.Conv2d(3, 8, 3, padding=2, dilation=2, bias=False, dtype=torch.float64)
        norm, x = batch_norm(8), torch.randn(2, 3, 9, 7, dtype=torch.float64)
        y = mk.conv_bn_act(x, conv.weight, *fold(norm), padding=2, dilation=2, act="relu")
        torch.testing.assert_close(y, norm(conv(x)).relu())

    def test_key_and_value_of_downsampled_attention(self) -> None:
        x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
        paths = []
        for depth in (4, 5):
            down = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False, dtype=torch.float64)
            paths.append((down, batch_norm(6), nn.Conv2d(6, depth, 1, bias=False, dtype=torch.float64)))
        (key_down, key_norm, key_project), (value_down, value_norm, value_project) = paths
        key_scale, key_shift = fold(key_norm)
        value_scale, value_shift = fold(value_norm)
        results = mk.kv_downsample(
            x,
            key_project.weight,
            value_project.weight,
            key_down=key_down.weight,
            key_scale=key_scale,
            key_shift=key_shift,
            value_down=value_down.weight,
            value_scale=value_scale,
            value_shift=value_shift,
            stride=2,
            padding=1,
        )
        for result, (down, norm, project) in zip(results, paths, strict=True):
            torch.testing.assert_close(result, project(norm(down(x))).flatten(2).transpose(1, 2))

    def test_multi_query_attention_is_scaled_dot_product_attention_over_one_head_of_keys(self) -> None:
        query = torch.randn(2, 3 * 8, 4, 5, dtype=torch.float64)
        key, value = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
        q = query.view(2, 3, 8, 20).transpose(2, 3)
        for scale in (None, 0.3):
            y = mk.mqa(query, key, value, heads=3, scale=scale)
            expected = F.scaled_dot_product_attention(
                q, key[:, None].expand(-1, 3, -1, -1), value[:, None].expand(-1, 3, -1, -1), scale=scale
            )
            torch.testing.assert_close(y, expected.transpose(2, 3).reshape(2, 18, 4, 5))

    def test_the_head_pools_convolves_and_classifies(self) -> None:
        conv = nn.Conv2d(6, 12, 1, bias=False, dtype=torch.float64)
        norm, classifier = batch_norm(12), nn.Linear(12, 5, dtype=torch.float64)
        x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
        features = norm(conv(x.mean((2, 3), keepdim=True))).relu().flatten(1)
        torch.testing.assert_close(mk.head(x, conv.weight, *fold(norm), act="relu"), features)
        y = mk.head(
            x,
            conv.weight,
            *fold(norm),
            act="relu",
            classifier_weight=classifier.weight,
            classifier_bias=classifier.bias,
        )
        torch.testing.assert_close(y, classifier(features))

    @pytest.mark.parametrize("function", ["dwconv", "conv"])
    @pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 5)])
    @pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 1, 1), (3, 3, 1)])
    def test_same_padding_is_timms(
        self, function: str, size: tuple[int, int], kernel: int, stride: int, dilation: int
    ) -> None:
        layers = pytest.importorskip("timm.layers")
        groups = 4 if function == "dwconv" else 1
        conv = layers.Conv2dSame(
            4, 4, kernel, stride=stride, dilation=dilation, groups=groups, bias=False, dtype=torch.float64
        )
        x = torch.randn(1, 4, *size, dtype=torch.float64)
        run = mk.dwconv_bn_act if function == "dwconv" else mk.conv_bn_act
        y = run(x, conv.weight, stride=stride, dilation=dilation, padding="same")
        torch.testing.assert_close(y, conv(x))

    def test_every_way_to_give_a_geometry_is_the_same(self) -> None:
        x, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 3, 3)
        first = mk.dwconv_bn_act(x, weight, stride=2, padding=1, dilation=2)
        assert torch.equal(first, mk.dwconv_bn_act(x, weight, stride=(2, 2), padding=[1, 1], dilation=(2, 2)))
        assert torch.equal(first, mk.dwconv_bn_act(x, weight, stride=[2, 2], padding=(1, 1, 1, 1), dilation=[2, 2]))

    def test_four_paddings_are_top_bottom_left_right(self) -> None:
        x, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3)
        y = mk.dwconv_bn_act(x, weight, padding=(0, 1, 2, 3))
        torch.testing.assert_close(y, F.conv2d(F.pad(x, (2, 3, 0, 1)), weight, groups=4))

    def test_activations_are_named_as_in_timm(self) -> None:
        assert list(MODULES) == list(ACTIVATIONS)


class TestFoldBatchNorm:
    def test_it_is_eval_mode_batch_norm(self) -> None:
        norm, x = batch_norm(5), torch.randn(2, 5, 3, 3, dtype=torch.float64)
        scale, shift = fold(norm)
        torch.testing.assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), norm(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_is_rounded_once(self, dtype: torch.dtype) -> None:
        weight, bias, mean = torch.randn(3, 1000).to(dtype)
        var = torch.rand(1000).to(dtype) + 1e-3
        scale, shift = mk.fold_batch_norm(weight, bias, mean, var, 1e-5)
        exact = weight.double() / (var.double() + 1e-5).sqrt()
        assert scale.dtype == shift.dtype == torch.float32
        # float64's own error can move what lies halfway between two float32 values
        assert (scale != exact.float()).sum() <= 1
        assert (shift != (bias.double() - mean.double() * exact).float()).sum() <= 1

    def test_absent_weight_and_bias_are_one_and_zero(self) -> None:
        mean, var = torch.randn(4), torch.rand(4)
        folded = mk.fold_batch_norm(None, None, mean, var, 1e-3)
        given = mk.fold_batch_norm(torch.ones(4), torch.zeros(4), mean, var, 1e-3)
        assert all(map(torch.equal, folded, given))

    def test_gradients_flow_through_it(self) -> None:
        inputs = [torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
        assert torch.autograd.gradcheck(lambda *a: mk.fold_batch_norm(*a, 1e-3), inputs)

    def test_wrong_arguments_are_named(self) -> None:
        good = torch.rand(4)
        with pytest.raises(ValueError, match=r"`var` must have shape \[4\], as `mean`, got \(3,\)"):
            mk.fold_batch_norm(good, good, good, good[:3], 1e-5)
        with pytest.raises(TypeError, match="`weight` must be float32, bfloat16, float16 or float64, got int64"):
            mk.fold_batch_norm(good.long(), good, good, good, 1e-5)
        with pytest.raises(ValueError, match="`bias` must be on `mean`'s device, cpu, got meta"):
            mk.fold_batch_norm(good, good.to("meta"), good, good, 1e-5)


class TestRefusals:
    @pytest.mark.parametrize("name", CALLS)
    def test_the_good_calls_are_good(self, name: str) -> None:
        function, arguments = CALLS[name]
        results = function(**arguments)
        assert all(result.isfinite().all() for result in (results if isinstance(results, tuple) else (results,)))

    @pytest.mark.parametrize(("name", "change", "error", "message"), REFUSALS, ids=lambda value: str(value)[:40])
    def test_a_wrong_argument_is_named_with_what_was_expected_and_got(
        self, name: str, change: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        function, arguments = CALLS[name]
        with pytest.raises(error) as raised:
            function(**{**arguments, **change})
        assert message in str(raised.value)

    def test_prepack_says_what_it_needs(self) -> None:
        with pytest.raises(ValueError, match=r"`weight` must have shape \[K, C, kh, kw\], got \(8, 6\)"):
            mk.prepack(randn(8, 6))
        with pytest.raises(ValueError, match=r"`weight` must have shape \[C, 1, kh, kw\], got \(8, 6, 3, 3\)"):
            mk.prepack(randn(8, 6, 3, 3), depthwise=True)
        with pytest.raises(ValueError, match=r"`scale` must have shape \[8\], got \(6,\)"):
            mk.prepack(randn(8, 6, 3, 3), randn(6))
        if not native.available():
            with pytest.raises(RuntimeError, match=r"needs the C\+\+ library"):
                mk.prepack(randn(8, 6, 3, 3))


class TestWhereItRuns:
    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names of the ops that the functions call, in order."""
        called: list[str] = []
        original = ops.pwconv_bn_act

        def count(*arguments: Any) -> Any:
            called.append("pwconv_bn_act")
            return original(*arguments)

        monkeypatch.setattr(ops, "pwconv_bn_act", count)
        return called

    def test_the_op_runs_where_the_library_can(self, counted: list[str]) -> None:
        function, arguments = CALLS["pwconv"]
        function(**arguments)
        assert counted == (["pwconv_bn_act"] if native.available() else [])

    def test_a_switch_sends_the_call_to_the_reference(
        self, counted: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        function, arguments = CALLS["pwconv"]
        monkeypatch.setenv(environment.switch_of("pwconv_bn_act"), "1")
        y = function(**arguments)
        assert counted == []
        monkeypatch.setenv(environment.switch_of("pwconv_bn_act"), "0")
        torch.testing.assert_close(function(**arguments), y)

    def test_float64_runs_through_the_reference(self, counted: list[str]) -> None:
        function, arguments = CALLS["pwconv"]
        y = function(**{name: value.double() for name, value in arguments.items()})
        assert y.dtype == torch.float64
        assert counted == []

    @pytest.mark.parametrize("name", CALLS)
    def test_meta_tensors_give_shapes(self, name: str) -> None:
        function, arguments = CALLS[name]
        real = function(**arguments)
        meta = function(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
        for got, wanted in zip(_tuple(meta), _tuple(real), strict=True):
            assert got.is_meta
            assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())

    @pytest.mark.parametrize("name", CALLS)
    def test_fake_tensors_give_shapes(self, name: str) -> None:
        function, arguments = CALLS[name]
        real = function(**arguments)
        with FakeTensorMode() as mode:
            fake = function(
                **{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            )
        for got, wanted in zip(_tuple(fake), _tuple(real), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())

    @pytest.mark.parametrize("disabled", [False, True], ids=["op", "reference"])
    @pytest.mark.parametrize("name", CALLS)
    def test_autocast_is_the_same_on_both_roads(
        self, name: str, disabled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        function, arguments = CALLS[name]
        if disabled:
            monkeypatch.setenv(environment.DISABLE, "1")
        vectors = ("scale", "shift", "gamma")
        low = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and not k.endswith(vectors) else v
            for k, v in arguments.items()
        }
        expected = _tuple(function(**low))
        mixed = dict(arguments)
        first = next(iter(mixed))
        mixed[first] = mixed[first].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            for given in (arguments, mixed):
                for got, wanted in zip(_tuple(function(**given)), expected, strict=True):
                    assert got.dtype == torch.bfloat16
                    assert torch.equal(got, wanted)


class TestGradients:
    @pytest.mark.parametrize("name", CALLS)
    def test_gradcheck_in_float64(self, name: str) -> None:
        function, arguments = CALLS[name]
        small = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        if "x" in small and "key" not in small:
            small["x"] = small["x"][:1, :, :4, :3]
        if isinstance(small.get("residual"), torch.Tensor):
            small["residual"] = small["residual"][:1, :, :4, :3]
        names = [k for k, v in small.items() if isinstance(v, torch.Tensor)]
        leaves = [small[k].clone().requires_grad_() for k in names]
        extra = {} if name in ("mqa", "kv", "projected", "attention") else {"act": "gelu"}
        assert torch.autograd.gradcheck(
            lambda *values: function(**{**small, **dict(zip(names, values, strict=True)), **extra}), leaves
        )

    def test_twice_differentiable_through_the_reference(self) -> None:
        x = randn(1, 2, 3, 3, dtype=torch.float64).requires_grad_()
        weight = randn(2, 1, 3, 3, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, w: mk.dwconv_bn_act(x, w, padding=1, act="silu"), (x, weight))


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> None:
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", CALLS)
    def test_fullgraph_is_the_same_as_eager(self, name: str) -> None:
        function, arguments = CALLS[name]
        compiled = torch.compile(lambda kwargs: function(**kwargs), fullgraph=True, backend="aot_eager")
        for got, wanted in zip(_tuple(compiled(arguments)), _tuple(function(**arguments)), strict=True):
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()

    @pytest.mark.parametrize("name", ["dwconv", "conv", "kv", "conv_pair"])
    def test_one_dynamic_graph_serves_many_sizes_and_same_padding_follows_them(self, name: str) -> None:
        function, arguments = CALLS[name]
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        options = {k: v for k, v in arguments.items() if k not in ("stride", "padding")}

        def call(x: torch.Tensor) -> Any:
            return function(**{**options, "x": x}, stride=2, padding="same")

        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        for batch, height, width in ((2, 9, 7), (3, 8, 12), (5, 31, 6)):
            x = randn(batch, 6, height, width)
            for got, wanted in zip(_tuple(compiled(x)), _tuple(call(x)), strict=True):
                assert torch.equal(got, wanted)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("name", CALLS)
    def test_gradients_through_a_compiled_graph_are_eagers(self, name: str) -> None:
        function, arguments = CALLS[name]
        names = [k for k, v in arguments.items() if isinstance(v, torch.Tensor)]

        def loss(*values: torch.Tensor) -> torch.Tensor:
            results = _tuple(function(**{**arguments, **dict(zip(names, values, strict=True))}))
            return torch.stack([result.square().sum() for result in results]).sum()

        grads = []
        for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [arguments[k].clone().requires_grad_() for k in names]
            grads.append(torch.autograd.grad(run(*leaves), leaves))
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted)

    def test_inductor_runs_a_whole_block_and_keeps_nhwc(self) -> None:
        start, mid = randn(8, 1, 3, 3), randn(16, 1, 5, 5)
        expand, project = randn(16, 8, 1, 1), randn(8, 16, 1, 1)
        scale = torch.rand(16)

        def block(x: torch.Tensor) -> torch.Tensor:
            y = mk.dwconv_bn_act(x, start, padding=1)
            y = mk.pwconv_bn_act(y, expand, scale, scale, act="relu")
            y = mk.dwconv_bn_act(y, mid, padding=2, act="relu")
            return mk.pwconv_bn_act(y, project, residual=x)

        x = randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last)
        y = torch.compile(block, fullgraph=True)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, block(x))

    def test_a_graph_can_be_exported(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(randn(6, 1, 3, 3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return mk.dwconv_bn_act(x, self.weight, padding="same", stride=2, act="relu")

        block, x = Block(), randn(2, 6, 9, 9)
        exported = torch.export.export(block, (x,))
        assert torch.equal(exported.module()(x), block(x))


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
