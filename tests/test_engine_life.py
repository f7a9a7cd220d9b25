"""The life of an optimized network: making, falling back, copying, compiling, sharing between threads, ending."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engines import assert_twice_as_exact_as_eager, batches, needs_engine
from models import HYBRID, SMALL, create, images, tensors_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer, make_fx

import mnv4_kernels as mk
from mnv4_kernels.backends import native

timm = pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def small() -> mk.OptimizedNetwork:
    return mk.optimize(create(SMALL))


@pytest.fixture(scope="module")
def hybrid() -> mk.OptimizedNetwork:
    return mk.optimize(create(HYBRID))


def engine_bytes() -> int:
    """What all engines hold, garbage collected."""
    gc.collect()
    return int(native.module().engine_bytes())


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What must not change: classes, modes, tensors and their identity, hooks, attributes."""
    modules = tuple(
        (name, type(module), module.training, tuple(vars(module))) for name, module in model.named_modules()
    )
    hooks = tuple(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    return modules, hooks, tuple((id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors)


class TestMaking:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", [SMALL, HYBRID])
    def test_the_model_stays_as_it_is(self, name: str, dtype: torch.dtype) -> None:
        model = create(name)
        before, values = snapshot(model), [value.clone() for value in model.state_dict().values()]
        mk.optimize(model, dtype)(images())
        assert snapshot(model) == before
        assert all(map(torch.equal, model.state_dict().values(), values))

    def test_later_changes_of_the_model_are_not_seen(self) -> None:
        model = create(SMALL)
        fast = mk.optimize(model)
        before = fast(images())
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(fast(images()), before)

    def test_it_has_no_gradients_and_says_so(self, small: mk.OptimizedNetwork) -> None:
        assert not small.training
        assert not list(small.parameters())
        with torch.enable_grad(), pytest.raises(RuntimeError, match=r"no gradients: call it under torch\.no_grad"):
            small(images().requires_grad_())
        with torch.enable_grad():
            assert not small(images()).requires_grad

    def test_a_model_in_train_mode_is_refused_untouched(self) -> None:
        model = create(SMALL).train()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"`model` must be in eval mode: call model\.eval\(\) first"):
            mk.optimize(model)
        assert snapshot(model) == before

    def test_another_model_is_refused_untouched(self) -> None:
        model = timm.create_model("resnet18").eval()
        before = snapshot(model)
        with pytest.raises(mk.OptimizeError, match=r"timm's MobileNetV3 or MobileNetV3Features, got ResNet"):
            mk.optimize(model)
        assert snapshot(model) == before

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
    def test_another_dtype_is_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=f"`dtype` must be one of torch.float32, .*, got {dtype}"):
            mk.optimize(create(SMALL), dtype)

    def test_what_is_no_module_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got str"):
            mk.optimize(SMALL)  # type: ignore[arg-type]

    def test_a_model_elsewhere_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`model` must be on the CPU or one CUDA device, got meta"):
            mk.optimize(timm.create_model(SMALL).eval().to("meta"))

    def test_without_the_library_there_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = create(SMALL)
        before = snapshot(model)
        monkeypatch.setattr(native, "_loaded", lambda: (None, ("it is Sunday",)))
        with pytest.raises(mk.OptimizeError, match=r"the engine needs the C\+\+ library: it is Sunday"):
            mk.optimize(model)
        assert snapshot(model) == before

    @pytest.mark.parametrize("pool", ["max", "avgmax", "fast"])
    def test_a_head_with_another_pool_is_refused_by_name(self, pool: str) -> None:
        with pytest.raises(mk.OptimizeError, match=f"`head` has no place in a program: global pool '{pool}'"):
            mk.optimize(create(SMALL, global_pool=pool))

    def test_hooks_inside_blocks_are_refused(self) -> None:
        model = create(SMALL, features_only=True, feature_location="expansion", out_indices=(1, 2, 3))
        with pytest.raises(mk.OptimizeError, match="feature hooks inside blocks"):
            mk.optimize(model)


class TestInputs:
    BAD: tuple[tuple[Any, type[Exception], str], ...] = (
        (torch.zeros(3, 64, 64), ValueError, r"`x` must be a tensor \[N, 3, H, W\], got shape \(3, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"`x` must be a tensor \[N, 3, H, W\], got shape \(1, 4, 64, 64\)"),
        ([1, 2], ValueError, r"`x` must be a tensor \[N, 3, H, W\], got list"),
        (torch.zeros(1, 3, 64, 64).double(), ValueError, "`x` must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(1, 3, 64, 64).long(), ValueError, "`x` must be float32, bfloat16 or float16, got torch.int64"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, "`x` must be on cpu, as the network is, got meta"),
    )

    @pytest.mark.parametrize(("x", "error", "text"), BAD)
    def test_a_wrong_input_gets_an_error_that_names_it(
        self, small: mk.OptimizedNetwork, x: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            small(x)
        assert small(images()).isfinite().all()

    @pytest.mark.parametrize("wanted", [torch.float16, torch.float64, torch.device("meta")], ids=str)
    def test_it_is_not_moved_or_converted_in_silence(self, small: mk.OptimizedNetwork, wanted: Any) -> None:
        with pytest.raises(RuntimeError, match="an optimized network can't become"):
            small.to(wanted)
        assert small.to("cpu").float().to(memory_format=torch.channels_last) is small
        assert small(images()).isfinite().all()

    def test_a_feature_extractor_has_no_other_features(self) -> None:
        fast = mk.optimize(create(SMALL, features_only=True))
        with pytest.raises(RuntimeError, match="a features_only model has no forward_features"):
            fast.forward_features(images())

    def test_the_op_itself_checks_channels_too(self, small: mk.OptimizedNetwork) -> None:
        (part,) = small.parts
        with pytest.raises(RuntimeError, match=r"`x` must have .*channels"):
            part(images(1, 8, 64, 64))


def assert_freed(held: list[Any], before: int) -> None:
    """Drops what `held` holds: all engines hold `before` bytes afterwards."""
    held.clear()
    assert engine_bytes() == before


def _traced(call: Callable[[], None]) -> None:
    graph = make_fx(lambda x: (call(), x + 1)[1])(images()).graph
    assert not [node for node in graph.nodes if "mnv4" in str(node.target)]


def _about_to_be_traced(call: Callable[[], None]) -> None:
    # a tracer has no graph yet when its modes begin
    with ProxyTorchDispatchMode(PythonKeyTracer(), "symbolic"):
        call()


def _faked(call: Callable[[], None]) -> None:
    with FakeTensorMode(), torch.device("meta"):
        call()


def squeezed(**options: Any) -> nn.Module:
    """A small model with squeeze-and-excitation in its sixth block."""
    from models import randomize_
    from timm.layers import SqueezeExcite

    torch.manual_seed(0)
    model = timm.create_model(SMALL, **options)
    block = model.blocks[2][2]
    block.se = SqueezeExcite(block.pw_proj.conv.in_channels)
    return randomize_(model).eval()


class TestFallingBack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"features_only": True}, {"num_classes": 0}], ids=str)
    def test_squeeze_and_excitation_runs_by_timms_code_and_is_right(
        self, options: dict[str, Any], dtype: torch.dtype
    ) -> None:
        model = squeezed(**options)
        fast = mk.optimize(model, dtype)
        assert [name for name, _ in fast.fallbacks] == ["blocks.2.2"]
        assert "squeeze-and-excitation" in fast.fallbacks[0][1]
        assert "blocks.2.2 runs timm's own code: " in repr(fast)
        assert_twice_as_exact_as_eager(fast, model, batches(2, 3, 64, 48), dtype)

    def test_strict_names_the_module_instead(self) -> None:
        model = squeezed()
        before = snapshot(model)
        with pytest.raises(mk.OptimizeError, match=r"`blocks\.2\.2` has no place in a program: .*squeeze-and-excitat"):
            mk.optimize(model, strict=True)
        assert snapshot(model) == before

    def test_blocks_of_mobilenet_v3_run_by_timms_code_and_it_is_right(self) -> None:
        model = create("mobilenetv3_small_050", features_only=True)
        fast = mk.optimize(model)
        reasons = {reason.split()[0] for _, reason in fast.fallbacks}
        assert reasons == {"DepthwiseSeparableConv", "InvertedResidual"}
        assert_twice_as_exact_as_eager(fast, model, batches(2, 3, 64, 64))

    def test_a_model_that_falls_back_copies_and_pickles(self) -> None:
        fast = mk.optimize(squeezed())
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(again(images()), fast(images()))
            assert again.fallbacks == fast.fallbacks


class TestDeterminism:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_blur_medium"])
    def test_bits_do_not_depend_on_the_number_of_threads(self, name: str, dtype: torch.dtype) -> None:
        fast = mk.optimize(create(name), dtype)
        for shape in ((1, 3, 64, 64), (3, 3, 47, 65)):
            results = []
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)
                results.append((fast(images(*shape)), fast.forward_features(images(*shape))))
            for logits, features in results[1:]:
                assert torch.equal(logits, results[0][0])
                assert torch.equal(features, results[0][1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", [SMALL, HYBRID])
    def test_bits_do_not_depend_on_the_rest_of_the_batch(self, name: str, dtype: torch.dtype) -> None:
        fast = mk.optimize(create(name), dtype)
        x = images(17, 3, 64, 48)
        whole = fast(x)
        for index in (0, 8, 16):
            assert torch.equal(fast(x[index : index + 1]), whole[index : index + 1])
        assert torch.equal(torch.cat([fast(x[:5]), fast(x[5:])]), whole)

    def test_calls_repeat_to_the_bit(self, hybrid: mk.OptimizedNetwork) -> None:
        torch.set_num_threads(2)
        first = hybrid(images())
        assert all(torch.equal(hybrid(images()), first) for _ in range(20))


class TestThreads:
    def test_concurrent_calls_of_one_network_do_not_meet(self, small: mk.OptimizedNetwork) -> None:
        inputs = [images(1 + index % 3, 3, 32 + 16 * (index % 4), 48, seed=index) for index in range(12)]
        expected = [small(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                assert all(map(torch.equal, pool.map(_call, [small] * 12, inputs), expected))

    def test_the_first_calls_of_a_network_may_be_concurrent(self) -> None:
        fast = mk.optimize(create(SMALL))
        start = threading.Barrier(4)

        def first(_: int) -> torch.Tensor:
            start.wait()
            return _call(fast, images())

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(first, range(4)))
        assert all(torch.equal(result, results[0]) for result in results)

    def test_networks_made_used_and_dropped_in_many_threads(self) -> None:
        model = create(SMALL)
        expected = mk.optimize(model)(images())
        before = engine_bytes()

        def live(_: int) -> bool:
            with torch.no_grad():
                return torch.equal(mk.optimize(model)(images()), expected)

        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(live, range(6)))
        assert engine_bytes() == before

    def test_other_python_threads_run_meanwhile(self, hybrid: mk.OptimizedNetwork) -> None:
        # the interpreter's lock is released: a thread that only counts gets on during one long call
        torch.set_num_threads(1)
        x = images(8, 3, 128, 128)
        hybrid(x)
        counted, stop = [0], threading.Event()

        def count() -> None:
            while not stop.is_set():
                counted[0] += 1

        counter = threading.Thread(target=count)
        counter.start()
        try:
            before = counted[0]
            hybrid(x)
            during = counted[0] - before
        finally:
            stop.set()
            counter.join()
        assert during > 1000

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
    def test_a_forked_child_of_one_thread_computes_the_same(self, small: mk.OptimizedNetwork) -> None:
        torch.set_num_threads(1)
        before = small(images())
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(small(images()), before) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestMemory:
    @pytest.mark.parametrize("name", [SMALL, HYBRID])
    def test_a_networks_memory_goes_with_it(self, name: str) -> None:
        model = create(name)
        before = engine_bytes()
        fast = mk.optimize(model)
        weights = engine_bytes() - before
        # at least every weight, in float32 or half of that
        assert weights >= 2 * sum(parameter.numel() for parameter in model.parameters())
        for size in (32, 64, 96):
            fast(images(2, 3, size, size))
        assert engine_bytes() > before + weights
        del fast
        assert engine_bytes() == before

    @pytest.mark.parametrize("trace", [_traced, _about_to_be_traced, _faked])
    def test_an_engine_collected_under_a_tracer_is_freed(self, trace: Callable[[Callable[[], None]], None]) -> None:
        before = engine_bytes()
        held = [mk.optimize(create(SMALL))]
        assert engine_bytes() > before
        trace(lambda: assert_freed(held, before))

    def test_info_tells_what_engines_hold(self, capsys: pytest.CaptureFixture[str]) -> None:
        from mnv4_kernels.cli import main

        fast = mk.optimize(create(SMALL))
        held = engine_bytes()
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["engine_bytes"] == held
        assert main(["info"]) == 0
        assert f"{held / 1e6:.1f} MB" in capsys.readouterr().out
        del fast

    def test_plans_of_many_shapes_are_bounded(self) -> None:
        fast = mk.optimize(create(SMALL))
        for width in range(128, 128 + 20):
            fast(images(1, 3, 64, width))
        full = engine_bytes()
        # each of them smaller than any before, and so no plan more is allowed to be kept
        for width in range(32, 32 + 64):
            fast(images(1, 3, 64, width))
        assert engine_bytes() <= full

    def test_shapes_share_their_weights(self) -> None:
        fast = mk.optimize(create(SMALL))
        weights = engine_bytes()
        fast(images(1, 3, 32, 32))
        first = engine_bytes() - weights
        fast(images(1, 3, 32, 48))
        assert engine_bytes() - weights - first < 3 * first < weights

    def test_concurrent_calls_leave_one_arena_behind(self, small: mk.OptimizedNetwork) -> None:
        small(images())
        before = engine_bytes()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(_call, [small] * 12, [images()] * 12))
        assert engine_bytes() <= before + _arenas_of_one_shape(small)

    def test_an_ended_engine_is_an_error_and_not_another_model(self) -> None:
        from mnv4_kernels.ops.engine import engine_run

        fast = mk.optimize(create(SMALL))
        handle = fast.parts[0]._handle
        del fast
        gc.collect()
        other = mk.optimize(create(SMALL))
        assert other.parts[0]._handle != handle
        with pytest.raises(RuntimeError, match=f"`handle` must be that of a living engine, got {handle}"):
            engine_run(handle, images(), 0)


class TestCopies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("again", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
    def test_copies_compute_the_same_and_live_on_their_own(self, again: Any, dtype: torch.dtype) -> None:
        fast = mk.optimize(create(HYBRID, features_only=True), dtype)
        expected = fast(images())
        twin = again(fast)
        del fast
        gc.collect()
        assert all(map(torch.equal, twin(images()), expected))
        assert all(map(torch.equal, again(twin)(images()), expected))
        assert not twin.training

    def test_copies_of_winograds_terms_compute_the_same(self) -> None:
        # anti-aliased networks have dense convolutions of stride 1, whose terms don't tell every weight
        fast = mk.optimize(create("mobilenetv4_conv_blur_medium", num_classes=0))
        assert torch.equal(copy.deepcopy(copy.deepcopy(fast))(images()), fast(images()))

    def test_a_saved_network_loads_without_its_model(self, tmp_path: Any) -> None:
        fast = mk.optimize(create(SMALL))
        torch.save(fast, tmp_path / "fast.pt")
        loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
        assert torch.equal(loaded(images()), fast(images()))
        assert torch.equal(loaded.forward_features(images()), fast.forward_features(images()))

    def test_without_the_library_unpickling_gives_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        saved = pickle.dumps(mk.optimize(create(SMALL)))
        monkeypatch.setattr(native, "_loaded", lambda: (None, ("it is Sunday",)))
        with pytest.raises(mk.OptimizeError, match=r"the engine needs the C\+\+ library: it is Sunday"):
            pickle.loads(saved)


def _call(fast: mk.OptimizedNetwork, x: torch.Tensor) -> torch.Tensor:
    # gradients are switched off for each thread on its own
    with torch.no_grad():
        result: torch.Tensor = tensors_of(fast(x))[0]
    return result


def _arenas_of_one_shape(fast: mk.OptimizedNetwork) -> int:
    """What one more kept arena of `images()` would be, for a plan of one thread."""
    twin = copy.deepcopy(fast)
    before = engine_bytes()
    _call(twin, images())
    return engine_bytes() - before
