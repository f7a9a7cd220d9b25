"""When timm's own path must run, it runs, and the rest stays fast; the reason can be read."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import HYBRID, SMALL, assert_as_exact, convolutions, create, double_of, images, ops_called
from torch import nn

import mnv4_kernels as mk
from mnv4_kernels import environment

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
]


def patched(name: str = SMALL, **options: Any) -> Any:
    """A patched model in eval mode."""
    model = create(name, **options)
    mk.patch(model)
    return model


def reasons(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, str]:
    """module -> why it isn't fused, by `explain`."""
    return {row.name: row.reason for row in mk.explain(model, images() if x is None else x).rows}


def grads_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a loss with respect to the input and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().mean().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]


class TestGradients:
    @pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_aa_medium"])
    def test_eval_mode_with_gradients_is_as_exact_as_timms(self, name: str) -> None:
        model = create(name)
        eager, exact = grads_of(model, images()), grads_of(double_of(model), images().double())
        mk.patch(model)
        assert ops_called(lambda: model(images()))
        actual = grads_of(model, images())
        for mine, theirs, true in zip(actual, eager, exact, strict=True):
            if true.norm() > 1e-6:
                assert_as_exact(mine, theirs, true, roundings=2 * convolutions(model))

    def test_a_backward_after_a_change_of_mode_is_the_forwards(self) -> None:
        model = patched()
        expected = grads_of(copy.deepcopy(model), images())[0]
        x = images().requires_grad_()
        loss = model(x).square().mean()
        model.train()
        statistics = model.bn1.running_mean.clone()
        loss.backward()
        assert x.grad is not None
        assert torch.equal(x.grad, expected)
        assert torch.equal(model.bn1.running_mean, statistics)

    def test_a_parameter_edited_before_the_backward_raises_as_in_eager(self) -> None:
        model = patched()
        loss = model(images()).square().mean()
        with torch.no_grad():
            model.blocks[2][1].pw_exp.conv.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_only_what_asks_gets_gradients(self) -> None:
        model = patched()
        model.requires_grad_(False)
        assert not model(images()).requires_grad
        model.classifier.weight.requires_grad_()
        model(images()).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["classifier.weight"]

    def test_a_second_derivative_is_refused_by_name(self) -> None:
        model = patched()
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()

    def test_inner_backward_hooks_run(self) -> None:
        model = patched()
        seen = []
        model.blocks[2][1].dw_mid.register_full_backward_hook(lambda *_: seen.append("dw_mid"))
        model(images()).square().mean().backward()
        assert seen == ["dw_mid"]


class TestHooks:
    def test_hooks_on_blocks_leave_every_block_fused(self) -> None:
        model = patched(HYBRID)
        seen = []
        for stage in model.blocks:
            for block in stage:
                block.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        with torch.no_grad():
            called = [op for op in ops_called(lambda: model(images())) if op != "prepack"]
        assert len(seen) == sum(map(len, model.blocks))
        assert called[0] == "conv_bn_act"
        assert called[-1] == "head"
        assert len(called) > len(seen)

    @pytest.mark.parametrize("where", ["dw_mid.bn", "pw_exp", "pw_exp.conv", "dw_mid.bn.act", "drop_path"])
    @pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_inside_a_block_see_timms_values(self, where: str, kind: str) -> None:
        model = create(SMALL, drop_path_rate=0.1)
        record: list[torch.Tensor] = []
        block = model.blocks[2][1]

        def hook(module: nn.Module, arguments: tuple[torch.Tensor], *result: torch.Tensor) -> None:
            record.append((result or arguments)[0].clone())

        getattr(block.get_submodule(where), kind)(hook)
        with torch.no_grad():
            model(images())
            mk.patch(model)
            model(images())
        assert len(record) == 2
        torch.testing.assert_close(record[1], record[0], rtol=1e-4, atol=1e-4)
        assert "forward hook" in reasons(model)["blocks.2.1"]
        assert not reasons(model)["blocks.2.0"]

    def test_a_hook_registered_and_removed_later_is_respected(self) -> None:
        model = patched()
        with torch.no_grad():
            expected = model(images())
            handle = model.blocks[2][1].pw_proj.register_forward_hook(lambda module, args, y: y * 0)
            assert not torch.equal(model(images()), expected)
            handle.remove()
            assert torch.equal(model(images()), expected)

    def test_hooks_on_the_stem_and_the_head_run(self) -> None:
        model = patched()
        seen = []
        for name in ("conv_stem", "bn1", "global_pool", "conv_head", "norm_head", "flatten", "classifier"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        with torch.no_grad():
            model(images())
        assert seen == ["conv_stem", "bn1", "global_pool", "conv_head", "norm_head", "flatten", "classifier"]

    def test_global_hooks_see_every_module(self) -> None:
        model = patched()
        seen: set[nn.Module] = set()
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
        try:
            with torch.no_grad():
                model(images())
        finally:
            handle.remove()
        assert model.blocks[2][1].pw_exp.conv in seen


class TestModes:
    def test_a_norm_in_train_mode_inside_an_eval_model_uses_batch_statistics(self) -> None:
        model = create(SMALL)
        norm = model.blocks[2][1].dw_mid.bn.train()
        twin = copy.deepcopy(model)
        mk.patch(model)
        with torch.no_grad():
            torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_mean, twin.blocks[2][1].dw_mid.bn.running_mean, rtol=1e-3, atol=1e-3)
        assert "train mode" in reasons(model)["blocks.2.1"]

    def test_dropout_put_in_train_mode_drops(self) -> None:
        model = patched(HYBRID, drop_path_rate=0.9)
        with torch.no_grad():
            expected = model(images())
            for module in model.modules():
                if type(module).__name__ == "DropPath":
                    module.train()
            assert not torch.equal(model(images()), expected)

    def test_attention_dropout_put_in_train_mode_drops(self) -> None:
        model = patched(HYBRID)
        with torch.no_grad():
            expected = model(images())
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.5
                    module.train()
            assert not torch.equal(model(images()), expected)

    def test_gradient_checkpointing_is_timms(self) -> None:
        # not ReLU, whose gradient a rounding may switch on or off
        model = create(SMALL, act_layer="silu")
        expected = grads_of(model, images())
        mk.patch(model)
        model.set_grad_checkpointing(True)
        for mine, theirs in zip(grads_of(model, images()), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)

    def test_inference_mode_runs_the_ops_and_leaves_plans_for_other_modes(self) -> None:
        model = patched()
        with torch.inference_mode():
            assert ops_called(lambda: model(images()))
            expected = model(images())
        # block by block there, the whole network as one program here: not the same sums
        torch.testing.assert_close(model(images()).detach(), expected, rtol=1e-4, atol=1e-4)
        model(images()).sum().backward()

    def test_parameters_made_in_inference_mode_keep_timms_path(self) -> None:
        with torch.inference_mode():
            model = create(SMALL)
            expected = model(images())
            report = mk.patch(model)
            assert "torch.inference_mode()" in str(report)
            torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
            model.blocks[2][1].pw_exp.conv.weight.mul_(2)
            twin = mk.unpatch(copy.deepcopy(model))
            torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)

    def test_autocast_keeps_timms_rounding(self) -> None:
        model = create(HYBRID)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(images())
            mk.patch(model)
            actual = model(images())
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.02 * expected.abs().max().item())

    def test_float64_is_timms_to_the_bit(self) -> None:
        model = create(SMALL).double()
        with torch.no_grad():
            expected = model(images().double())
            assert "float64" in str(mk.patch(model))
            assert torch.equal(model(images().double()), expected)

    def test_an_input_of_another_dtype_fails_as_in_eager(self) -> None:
        with pytest.raises(RuntimeError, match=r"dtype|type"), torch.no_grad():
            patched()(images().double())

    def test_an_image_without_a_batch_fails_or_works_as_in_eager(self) -> None:
        model = create(SMALL)
        for net in (model, patched()):
            with torch.no_grad(), pytest.raises((AssertionError, ValueError, RuntimeError)):
                net(images(3, 64, 64))

    def test_more_channels_than_the_stem_takes_fail(self) -> None:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"channels|shape"):
            patched()(images(1, 5, 64, 64))


class TestTracing:
    def test_torch_jit_trace_records_timms_path(self) -> None:
        model = patched()
        with torch.no_grad():
            traced = torch.jit.trace(model, images())
            assert "mnv4_kernels::" not in str(traced.inlined_graph)
            torch.testing.assert_close(traced(images()), model(images()), rtol=1e-4, atol=1e-4)

    def test_torch_jit_script_is_refused_and_works_after_unpatch(self) -> None:
        model = patched()
        before = [id(module) for module in model.modules()]
        with pytest.raises(RuntimeError, match=r"call mnv4_kernels\.unpatch\(model\) first"):
            torch.jit.script(nn.Sequential(model))
        assert [id(module) for module in model.modules()] == before
        mk.unpatch(model)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(model)(images()), model(images()), rtol=1e-4, atol=1e-4)

    def test_fx_traces_through_a_patched_model(self) -> None:
        model = patched()
        traced = torch.fx.symbolic_trace(model)
        with torch.no_grad():
            torch.testing.assert_close(traced(images()), model(images()), rtol=1e-4, atol=1e-4)

    def test_function_transforms_work(self) -> None:
        model = patched()
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        with torch.no_grad():
            expected = model(images())

        def call(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, values, (x,))

        batched = torch.func.vmap(call, in_dims=(None, 0))(parameters, images().unsqueeze(1))
        torch.testing.assert_close(batched.squeeze(1), expected, rtol=1e-4, atol=1e-4)
        y, tangent = torch.func.jvp(lambda x: call(parameters, x), (images(),), (images(seed=9),))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert tangent.abs().sum() > 0

    def test_functional_call_uses_the_parameters_that_it_is_given(self) -> None:
        model, other = patched(), create(SMALL, seed=4)
        with torch.no_grad():
            before = model(images())
            given = torch.func.functional_call(
                model, {**dict(other.named_parameters()), **dict(other.named_buffers())}, images()
            )
            torch.testing.assert_close(given, other(images()), rtol=1e-4, atol=1e-4)
            assert torch.equal(model(images()), before)


class TestSwitches:
    @pytest.mark.parametrize("value", ["1", "true", "yes"])
    def test_one_switch_sends_everything_down_timms_path(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = create(HYBRID)
        with torch.no_grad():
            expected = model(images())
            mk.patch(model)
            model(images())
            monkeypatch.setenv(environment.DISABLE, value)
            assert not ops_called(lambda: model(images()))
            assert torch.equal(model(images()), expected)
        assert set(reasons(model).values()) >= {f"turned off by {environment.DISABLE}={value}"} - {""}

    @pytest.mark.parametrize("value", ["0", "", "false", "off"])
    def test_a_switch_set_to_no_is_off(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = patched()
        monkeypatch.setenv(environment.DISABLE, value)
        with torch.no_grad():
            assert ops_called(lambda: model(images()))

    @pytest.mark.parametrize("op", environment.OPS)
    def test_an_ops_own_switch_leaves_the_other_ops(self, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = create(HYBRID)
        with torch.no_grad():
            eager, exact = model(images()), double_of(model)(images().double())
            mk.patch(model)
            model.forward_head(model.forward_features(images()))
            before = ops_called(lambda: model.forward_head(model.forward_features(images())))
            assert "engine_run" in ops_called(lambda: model(images()))
            monkeypatch.setenv(environment.switch_of(op), "1")
            called = ops_called(lambda: model.forward_head(model.forward_features(images())))
            assert op not in called
            # a program computes what it is made of: it is off with any of its ops
            assert ("engine_run" in ops_called(lambda: model(images()))) is (op not in before)
            # attention runs as a whole or not at all
            together = {"mqa", "kv_downsample"} if op in ("mqa", "kv_downsample", "pwconv_bn_act") else {op}
            assert set(before) - together - {op} <= set(called)
            assert_as_exact(model(images()), eager, exact, roundings=convolutions(model))


class TestThreads:
    def test_calls_from_several_threads_agree(self) -> None:
        model = patched(HYBRID)
        xs = [images(seed=seed) for seed in range(4)]
        with torch.no_grad():
            expected = [create_reference(model)(x) for x in xs]
        found: dict[int, torch.Tensor] = {}

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    found[index] = model(xs[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(xs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[index], value) for index, value in enumerate(expected))

    def test_the_thread_count_changes_no_bit(self) -> None:
        model = patched(HYBRID)
        with torch.no_grad():
            one = model(images())
            torch.set_num_threads(2)
            two = model(images())
        assert torch.equal(one, two)


def create_reference(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A patched copy, used by one thread only."""
    return copy.deepcopy(model)


def test_an_input_is_never_written_to() -> None:
    for name in (SMALL, HYBRID):
        model, x = patched(name), images()
        before = x.clone()
        with torch.no_grad():
            model(x)
            model(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(x, before)
