"""An optimized network on a GPU that is not there: what is recorded, replayed, copied, dropped, and in which order."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from gpus import Tape, pretend
from models import SMALL, assert_as_exact, assert_same_strides, convolutions, create, double_of, images

import mnv4_kernels as mk
from mnv4_kernels.backends import cuda
from mnv4_kernels.engine import gpu
from mnv4_kernels.engine.graphs import GraphCache


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretend(monkeypatch)
    monkeypatch.setattr(gpu.GraphedNetwork, "_recorder", lambda network: Tape())
    with torch.no_grad():
        yield


def _tape(network: Any) -> Tape:
    return network._graphs._recorder


def _doubled(x: torch.Tensor) -> list[torch.Tensor]:
    return [x * 2]


class TestCache:
    def test_the_first_call_records_and_each_call_replays(self) -> None:
        tape = Tape()
        cache = GraphCache(tape, 4)
        for value in (1.0, 2.0):
            x = torch.full((1, 1, 2, 2), value)
            (y,) = cache.call("f", _doubled, x, torch.float32)
            assert torch.equal(y, x * 2)
        assert tape.events == ["record", "replay", "replay"]

    def test_results_are_the_callers_own(self) -> None:
        cache = GraphCache(Tape(), 4)
        (first,) = cache.call("f", _doubled, torch.ones(1, 1, 2, 2), torch.float32)
        cache.call("f", _doubled, torch.zeros(1, 1, 2, 2), torch.float32)
        assert torch.equal(first, torch.full((1, 1, 2, 2), 2.0))

    def test_each_function_shape_and_memory_format_has_a_recording_of_its_own(self) -> None:
        cache = GraphCache(Tape(), 8)
        for what, x in (
            ("f", torch.ones(1, 3, 2, 2)),
            ("g", torch.ones(1, 3, 2, 2)),
            ("f", torch.ones(2, 3, 2, 2)),
            ("f", torch.ones(1, 3, 2, 2).to(memory_format=torch.channels_last)),
            ("f", torch.ones(1, 3, 4, 4)[:, :, ::2, ::2]),
        ):
            cache.call(what, _doubled, x, torch.float32)
        # the sliced one is no other than the first
        assert len(cache) == 4

    def test_inputs_of_other_dtypes_share_a_recording(self) -> None:
        cache = GraphCache(Tape(), 8)
        for dtype in (torch.float32, torch.float16):
            (y,) = cache.call("f", _doubled, torch.ones(1, 3, 2, 2, dtype=dtype), torch.bfloat16)
            assert y.dtype == torch.bfloat16
        assert len(cache) == 1

    def test_the_least_recently_used_recording_goes_when_nothing_runs(self) -> None:
        tape = Tape()
        cache = GraphCache(tape, 2)
        one, two, three = (torch.ones(1, 1, 1, size) for size in (2, 3, 4))
        for x in (one, two, one, three, one):
            cache.call("f", _doubled, x, torch.float32)
        assert tape.events == [
            "record", "replay", "record", "replay", "replay", "wait", "record", "replay", "replay",
        ]  # fmt: skip
        assert len(cache) == 2

    def test_without_memory_the_other_recordings_go_and_the_new_one_is_tried_again(self) -> None:
        tape = Tape()
        cache = GraphCache(tape, 4)
        cache.call("f", _doubled, torch.ones(1, 1, 1, 2), torch.float32)
        tape.fail_with = [torch.OutOfMemoryError("none left")]
        (y,) = cache.call("f", _doubled, torch.ones(1, 1, 1, 3), torch.float32)
        assert torch.equal(y, torch.full((1, 1, 1, 3), 2.0))
        assert len(cache) == 1

    def test_what_a_failed_attempt_took_is_given_back_before_the_next(self) -> None:
        class Crowded(Tape):
            taken: Any = None
            given_back = False

            def record(self, run: Any, x: torch.Tensor) -> Any:
                if self.fail_with:
                    results = torch.empty(1)
                    self.taken = weakref.ref(results)
                    raise self.fail_with.pop()
                self.given_back = self.taken is not None and self.taken() is None
                return super().record(run, x)

        tape = Crowded()
        cache = GraphCache(tape, 4)
        cache.call("f", _doubled, torch.ones(1, 1, 1, 2), torch.float32)
        tape.fail_with = [torch.OutOfMemoryError("none left")]
        cache.call("f", _doubled, torch.ones(1, 1, 1, 3), torch.float32)
        assert tape.given_back

    def test_a_failure_leaves_the_cache_as_it_was(self) -> None:
        tape = Tape()
        cache = GraphCache(tape, 4)
        cache.call("f", _doubled, torch.ones(1, 1, 1, 2), torch.float32)
        tape.fail_with = [RuntimeError("a kernel that can't be recorded")]
        with pytest.raises(RuntimeError, match="can't be recorded"):
            cache.call("f", _doubled, torch.ones(1, 1, 1, 3), torch.float32)
        assert len(cache) == 1
        (y,) = cache.call("f", _doubled, torch.ones(1, 1, 1, 3), torch.float32)
        assert torch.equal(y, torch.full((1, 1, 1, 3), 2.0))

    def test_inside_somebody_elses_recording_the_launches_are_recorded_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tape = Tape()
        monkeypatch.setattr(tape, "recording_elsewhere", lambda: True)
        (y,) = GraphCache(tape, 4).call("f", _doubled, torch.ones(1, 1, 1, 2), torch.bfloat16)
        assert y.dtype == torch.bfloat16
        assert tape.events == []

    def test_a_recording_made_in_inference_mode_serves_calls_outside_of_it(self) -> None:
        cache = GraphCache(Tape(), 4)
        with torch.inference_mode():
            cache.call("f", _doubled, torch.ones(1, 1, 1, 2), torch.float32)
        (y,) = cache.call("f", _doubled, torch.full((1, 1, 1, 2), 3.0), torch.float32)
        assert torch.equal(y, torch.full((1, 1, 1, 2), 6.0))

    def test_threads_take_turns(self) -> None:
        cache = GraphCache(Tape(), 2)
        barrier = threading.Barrier(4)

        def call(value: int) -> bool:
            barrier.wait()
            good = True
            for size in (2, 3, 4, 2):
                x = torch.full((1, 1, 8, size), float(value))
                good &= torch.equal(cache.call("f", _doubled, x, torch.float32)[0], x * 2)
            return good

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(4)))


class TestNetwork:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_an_optimized_network_is_as_exact_as_eager_in_its_dtype(self, dtype: torch.dtype) -> None:
        model, x = create(SMALL), images()
        eager, exact = copy.deepcopy(model).to(dtype)(x.to(dtype)), double_of(model)(x.double())
        fast = mk.optimize(model, dtype)
        assert isinstance(fast, mk.OptimizedNetwork)
        y = fast(x)
        assert y.dtype == x.dtype
        assert_as_exact(y.to(dtype), eager, exact, convolutions(model))
        assert fast.fallbacks == []

    def test_the_model_stays_as_it_is_and_its_changes_are_not_seen(self) -> None:
        model = create(SMALL)
        classes = [type(module) for module in model.modules()]
        values = [value.clone() for value in model.state_dict().values()]
        fast = mk.optimize(model, torch.bfloat16)
        before = fast(images())
        assert [type(module) for module in model.modules()] == classes
        assert all(map(torch.equal, model.state_dict().values(), values))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(fast(images()), before)
        assert list(fast.parameters()) == []

    def test_maps_and_features_lie_in_memory_as_the_models_do(self) -> None:
        for model in (create(SMALL), create(SMALL, features_only=True)):
            for x in (images(), images().contiguous(memory_format=torch.channels_last)):
                call = (
                    (lambda net, x: net(x))
                    if hasattr(model, "feature_info")
                    else (lambda net, x: net.forward_features(x))
                )
                expected, found = call(model, x), call(mk.optimize(model), x)
                assert_same_strides(found, expected)
                for mine, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    def test_copies_and_pickles_record_anew_and_give_the_same(self) -> None:
        fast, x = mk.optimize(create(SMALL), torch.bfloat16), images()
        y = fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert other.graphs == 0
            assert torch.equal(other(x), y)
            assert _tape(other) is not _tape(fast)
        assert fast.graphs == 1

    def test_no_more_kinds_of_input_are_kept_than_the_bound(self) -> None:
        fast = mk.optimize(create(SMALL))
        for size in range(32, 32 + 3 * (gpu.GRAPHS + 2), 3):
            fast(images(1, 3, 32, size))
        assert fast.graphs == gpu.GRAPHS

    def test_a_batch_of_none_is_recorded_by_nobody(self) -> None:
        fast = mk.optimize(create(SMALL))
        assert fast(torch.empty(0, 3, 64, 64)).shape == (0, 1000)
        assert fast.graphs == 0

    def test_a_pool_of_timms_is_named_and_refused_if_strict(self) -> None:
        model = create("mobilenetv4_conv_aa_medium")
        fast = mk.optimize(model)
        assert any(name.endswith("dw_mid.aa") and "anti-aliasing" in reason for name, reason in fast.fallbacks)
        with pytest.raises(mk.OptimizeError, match=r"`blocks\..*aa` has no kernel: anti-aliasing"):
            mk.optimize(model, strict=True)

    def test_compiled_code_calls_it_and_does_not_look_inside(self) -> None:
        fast, x = mk.optimize(create(SMALL)), images()
        compiled = torch.compile(lambda x: fast(x) + 1, backend="eager")
        assert torch.equal(compiled(x), fast(x) + 1)

    def test_a_network_goes_when_nothing_of_it_runs(self) -> None:
        fast = mk.optimize(create(SMALL))
        fast(images())
        events = _tape(fast).events
        assert "wait" not in events
        del fast
        gc.collect()
        assert events[-1] == "wait"

    def test_a_recording_made_under_autocast_is_no_other(self) -> None:
        x = images()
        plain = mk.optimize(create(SMALL))(x)
        fast = mk.optimize(create(SMALL))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), plain)
        assert torch.equal(fast(x), plain)

    def test_wrong_inputs_are_named(self) -> None:
        fast = mk.optimize(create(SMALL))
        with pytest.raises(ValueError, match=r"`x` must be on cpu, as the network is, got meta"):
            fast(torch.empty(1, 3, 64, 64, device="meta"))
        with pytest.raises(ValueError, match=r"`x` must be a tensor \[N, 3, H, W\], got shape \(3, 64, 64\)"):
            fast(torch.empty(3, 64, 64))
        with torch.enable_grad(), pytest.raises(RuntimeError, match="an optimized network has no gradients"):
            fast(images().requires_grad_())

    def test_without_a_device_that_the_kernels_know_there_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "reasons", lambda: ("Triton is not installed",))
        with pytest.raises(mk.OptimizeError, match="no Triton kernel can run here: Triton is not installed"):
            mk.optimize(create(SMALL))

    def test_a_network_whose_weights_came_back_elsewhere_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = pickle.dumps(mk.optimize(create(SMALL)))
        monkeypatch.undo()
        with pytest.raises(mk.OptimizeError, match="optimized for a GPU can't run on cpu"):
            pickle.loads(data)
