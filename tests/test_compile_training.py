"""torch.compile of a patched model in train mode: our training ops in one graph, for all sizes, as exact as eager."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import HYBRID, NAMES, SMALL, assert_as_exact, convolutions, double_of, images
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from training_models import assert_trains_alike, loss_of, smooth, trained

import mnv4_kernels as mk
from mnv4_kernels.modules.traced import describe

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

#: sizes that torch.compile gives symbols of their own: neither 1 nor equal to each other
SIZES = ((4, 3, 64, 96), (3, 3, 47, 65), (5, 3, 96, 33))


def slow(value: Any) -> Any:
    """A parameter of the slow run only."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def patched(name: str = SMALL, **options: Any) -> Any:
    model = smooth(name, **options)
    mk.patch(model)
    return model


class Recorder:
    """A backend that runs the graph as it is and counts what it calls."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        self.graphs.append(
            Counter(getattr(target, "__name__", str(target)).removesuffix(".default") for target in targets)
        )
        return graph.forward


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, **{"fullgraph": True, "backend": "eager", **options})


def assert_trains_as_eager(
    network: Any,
    model: nn.Module,
    x: torch.Tensor,
    prepare: Callable[[torch.Tensor], Any] = lambda x: None,
    tolerance: float = 1e-3,
) -> None:
    """`network`, compiled of `model`, does what `model` does: gradients and running statistics.

    Up to roundings, which are not the same in blocks that are in eval mode: in graphs those are timm's.
    """
    expected = trained(copy.deepcopy(model), x)

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        prepare(x)
        y: torch.Tensor = network(x)
        return y

    actual = trained(model, x, step)
    assert actual.keys() == expected.keys()
    everything = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        # what is zero but for rounding (a bias before a BatchNorm) counts by what it is a sum of
        largest = max(value.abs().max().item(), 1e-3 * everything)
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("name", [name if name in (SMALL, HYBRID) else slow(name) for name in NAMES])
def test_a_network_in_train_mode_is_one_graph_of_training_ops(name: str) -> None:
    model, recorder = patched(name), Recorder()
    compiled(model, backend=recorder)(images())
    (calls,) = recorder.graphs
    found = sum(calls[op] for op in ("bn_act_conv", "bn_act_dwconv", "bn_act_pwconv"))
    assert found == convolutions(model)
    assert not {"batch_norm", "scaled_dot_product_attention"} & calls.keys()
    # a blur pool is timm's, a convolution with a fixed filter
    assert calls["conv2d"] == sum(type(module).__name__ == "BlurPool2d" for module in model.modules())


@pytest.mark.parametrize("name", [SMALL, slow(HYBRID)])
def test_gradients_are_as_exact_as_eagers(name: str) -> None:
    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = compiled(model, backend="aot_eager")(x)
        return y

    assert_trains_alike(smooth(name), patched_step=step)


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.3},
        *(slow(options) for options in ({"drop_rate": 0.2}, {"features_only": True}, {"pad_type": "same"})),
    ],
    ids=str,
)
def test_what_trains_otherwise_trains_as_in_eager(options: dict[str, Any]) -> None:
    model = patched(SMALL, **options)
    call = (lambda y: y[-1].mean((2, 3))) if "features_only" in options else (lambda y: y)
    network = compiled(lambda x: call(model(x)))
    twin, x = copy.deepcopy(model), images(4, 3, 64, 64)
    expected = trained(twin, x, lambda model, x: call(model(x)))
    actual = trained(model, x, lambda model, x: network(x))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5 * value.abs().max().item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("marked", [False, True])
def test_one_compilation_trains_at_all_sizes(marked: bool) -> None:
    model = patched()
    network = compiled(model, dynamic=None if marked else True, backend="aot_eager")

    def mark(x: torch.Tensor) -> None:
        for axis in (0, 2, 3) if marked else ():
            torch._dynamo.mark_dynamic(x, axis)

    for size in SIZES:
        assert_trains_as_eager(network, model, images(*size), mark)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_parameters_that_are_frozen_later_get_no_gradients() -> None:
    model = patched()
    network = compiled(model)
    loss_of(network(images())).backward()
    model.zero_grad()
    model.blocks[0].requires_grad_(False)
    assert_trains_as_eager(network, model, images())
    assert all(parameter.grad is None for parameter in model.blocks[0].parameters())


def freeze_a_block(model: Any) -> None:
    model.blocks[2][1].eval()


def another_activation(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.act = nn.Hardswish()


def another_epsilon(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.eps = 0.5


def another_momentum(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.momentum = 0.5


def no_normalisation(model: Any) -> None:
    model.blocks[2][1].pw_proj.bn = nn.Identity()


def another_stride(model: Any) -> None:
    model.conv_stem.stride = (1, 1)


def other_weights(model: Any) -> None:
    model.load_state_dict(smooth(SMALL, seed=3).state_dict())


@pytest.mark.parametrize(
    "change",
    [
        another_epsilon,
        *map(
            slow,
            (freeze_a_block, another_activation, another_momentum, no_normalisation, another_stride, other_weights),
        ),
    ],
)
def test_a_change_after_compilation_is_seen(change: Callable[[Any], None]) -> None:
    model = patched()
    network = compiled(model)
    before = network(images())
    change(model)
    assert_trains_as_eager(network, model, images(), tolerance=1e-2 if change is freeze_a_block else 1e-3)
    if change is not another_momentum:
        assert not torch.equal(network(images()), before)


def cumulative_averages(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def hooks(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith(".conv"):
            module.register_forward_hook(lambda module, arguments, y: y * 1.5)


def attention_dropout(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.5


class TestTimmsPath:
    """What the traced ops can't take is traced as timm has it, piece by piece."""

    @pytest.mark.parametrize("change", [slow(hooks), attention_dropout])
    def test_what_the_ops_decline_is_timms(self, change: Callable[[Any], None]) -> None:
        model, recorder = patched(HYBRID), Recorder()
        change(model)
        compiled(model, backend=recorder)(images())
        (calls,) = recorder.graphs
        assert calls["conv2d"] + calls["batch_norm"] > 0

    def test_a_cumulative_average_is_timms(self) -> None:
        # timm's formula reads a counter's value, so that there is no full graph of it either
        model = patched()
        assert describe(model._mnv4_training_plan("stem"))
        cumulative_averages(model)
        assert not describe(model._mnv4_training_plan("stem"))

    def test_autocast_and_float64_are_timms(self) -> None:
        model, recorder = patched(), Recorder()
        with torch.autocast("cpu", torch.bfloat16):
            compiled(model, backend=recorder)(images())
        compiled(copy.deepcopy(model).double(), backend=recorder)(images().double())
        assert not any(calls["bn_act_pwconv"] for calls in recorder.graphs)


@pytest.mark.parametrize("layout", [torch.channels_last, slow(torch.contiguous_format)], ids=str)
@pytest.mark.parametrize("mode", ["default", slow("max-autotune")])
def test_inductor_copies_no_map(mode: str, layout: torch.memory_format) -> None:
    model, x = patched(), images().contiguous(memory_format=layout)
    twin = copy.deepcopy(model)
    network = torch.compile(model, fullgraph=True, mode=mode)
    actual, codes = run_and_get_code(lambda: trained(model, x, lambda model, x: network(x)))
    assert len(codes) == 2
    for name, value in trained(twin, x).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item(), msg=name)
    # the gradient of the global pool is the only map that inductor fills
    for code, expected in zip(codes, (0, 1), strict=True):
        assert "bn_act_pwconv" in code
        assert not re.search(r"clone|_to_copy|aten\.convolution", code[code.index("def call(") :])
        maps = re.findall(r"empty_strided_cpu\(\(\d+, \d+, (\d+), (\d+)\)", code)
        assert len([size for size in maps if size != ("1", "1")]) == expected


def test_what_was_compiled_in_train_mode_serves_eval_mode_too() -> None:
    model = patched()
    network = compiled(model)
    loss_of(network(images())).backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(network(images()), model(images()))
        exact = double_of(model)(images().double())
        assert_as_exact(network(images()), mk.unpatch(copy.deepcopy(model))(images()), exact, roundings=60)
