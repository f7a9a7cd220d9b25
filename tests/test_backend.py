"""torch.compile(model, backend="mnv4_kernels"): unpatched models, timm's and others, on the engine where it can."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import HYBRID, SMALL, assert_as_exact, assert_same_strides, create, images, randomize_, tensors_of
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import mnv4_kernels
from mnv4_kernels.compiler import FuseConvolutions, backend
from mnv4_kernels.compiler.fuse import obstacles
from mnv4_kernels.ops.subnetwork import subnetwork

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

ROOT = Path(__file__).resolve().parent.parent

#: sizes that torch.compile gives symbols of their own
SIZES = ((2, 3, 64, 96), (3, 3, 47, 65))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Fused:
    """A backend that runs the graph after our pass as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        FuseConvolutions()(graph.graph)
        graph.recompile()
        self.graphs.append(graph)
        return graph.forward

    def calls(self, number: int = -1) -> list[Any]:
        """What the graph calls, but for picking results out of lists."""
        nodes = [node for node in self.graphs[number].graph.nodes if node.op.startswith("call_") and node.users]
        return [node.target for node in nodes if "getitem" not in str(node.target)]


def compiled(model: Any, fused: Fused, **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=fused, **options)


def assert_exact(model: nn.Module, actual: Any, x: torch.Tensor, roundings: int = 60) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    assert_as_exact(actual, model(x), exact, roundings)


def torchvisions(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return randomize_(getattr(models, name)(num_classes=10).eval())


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("mnasnet1_0", marks=pytest.mark.slow)])
def test_a_network_that_is_not_timms_is_one_program_for_all_sizes(name: str) -> None:
    model, fused = torchvisions(name), Fused()
    network = compiled(model, fused)
    for size in SIZES:
        x = images(*size)
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        assert_exact(model, network(x), x)
    assert fused.calls() == [subnetwork]
    assert len(fused.graphs) == 1


@pytest.mark.parametrize(
    "name",
    [SMALL, *(pytest.param(f"mobilenetv4_conv_{kind}_medium", marks=pytest.mark.slow) for kind in ("aa", "blur"))],
)
def test_an_unpatched_network_of_timms_is_one_program(name: str) -> None:
    pytest.importorskip("timm")
    model, fused = create(name), Fused()
    assert_exact(model, compiled(model, fused)(images()), images(), roundings=100)
    assert fused.calls() == [subnetwork]


@pytest.mark.parametrize("options", [{}, pytest.param({"features_only": True}, marks=pytest.mark.slow)], ids=str)
def test_attention_stays_inductors_between_programs(options: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    model, fused = create(HYBRID, **options), Fused()
    x = images(2, 3, 64, 64)
    assert_exact(model, compiled(model, fused)(x), x, roundings=130)
    attentions = fused.calls().count(F.scaled_dot_product_attention)
    # keys and values of each, and what lies between two of them with its layer scales
    assert fused.calls().count(subnetwork) == 2 * attentions + 1 > 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "mobilenet_v3_large", "densenet121")]
)
def test_whatever_else_there_is_gives_the_same_result(name: str) -> None:
    model = torchvisions(name)
    assert_exact(model, compiled(model, Fused())(images()), images(), roundings=130)


class Chain(nn.Module):
    """Three convolutions, each followed by what the name says."""

    def __init__(self, between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1, bias=i > 0) for i in range(4))
        self.norm = nn.BatchNorm2d(8)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.norm(self.convs[0](x))
        y = self.convs[1](first)
        y = self.between(y, first)
        y = self.convs[3](self.convs[2](y))
        return y + x if y.shape == x.shape else y


def chain(between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda y, x: y) -> Chain:
    return randomize_(Chain(between).eval(), channels=8)  # type: ignore[return-value]


BETWEEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nothing": lambda y, x: y,
    "relu": lambda y, x: F.relu(y),
    "relu in place": lambda y, x: F.relu(y, inplace=True),
    "torch.relu": lambda y, x: torch.relu(y),
    "relu as a method": lambda y, x: y.relu(),
    "relu6": lambda y, x: F.relu6(y),
    "hardtanh of other limits": lambda y, x: F.hardtanh(y, -2.0, 6.0),
    "hardswish": lambda y, x: F.hardswish(y),
    "silu": lambda y, x: F.silu(y),
    "gelu": lambda y, x: F.gelu(y),
    "gelu tanh": lambda y, x: F.gelu(y, approximate="tanh"),
    "sigmoid": lambda y, x: torch.sigmoid(y),
    "a skip": lambda y, x: y + x,
    "a skip from the other side": lambda y, x: x + y,
    "a skip in place": lambda y, x: y.add_(x),
    "a skip in place into the earlier map": lambda y, x: x.add_(y) + x,
    "a scaled skip": lambda y, x: torch.add(y, x, alpha=2),
    "a broadcast skip": lambda y, x: y + x[:, :, :1, :1],
    "a layer scale": lambda y, x: y * x.new_tensor([0.5] * 8).view(1, -1, 1, 1),
    "a number added": lambda y, x: y + 1.5,
    "activation before the skip": lambda y, x: F.relu(y) + x,
    "activation after the skip": lambda y, x: F.relu(y + x),
    "used twice": lambda y, x: F.relu(y) + y,
    "written later": lambda y, x: F.relu(y) + x.mul_(2),
    "a view written": lambda y, x: y + x.view(-1).mul_(2).view_as(x),
    "average pool": lambda y, x: F.avg_pool2d(y, 3, 1, 1),
    "uncounted padding": lambda y, x: F.avg_pool2d(y, 3, 1, 1, count_include_pad=False),
    "zeros around": lambda y, x: F.pad(y, [1, 0, 2, 1]),
    "reflected around": lambda y, x: F.pad(y, [1, 1, 1, 1], "reflect"),
    "dropout": lambda y, x: F.dropout(y, 0.5, training=False),
    "squeeze and excitation": lambda y, x: y * y.mean((2, 3), keepdim=True).sigmoid(),
    "pooled and spread": lambda y, x: F.adaptive_avg_pool2d(y, 1).expand_as(y),
    "batch statistics": lambda y, x: F.batch_norm(y, None, None, training=True),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN.keys())
def test_nothing_between_convolutions_changes_the_result(between: Callable[..., torch.Tensor]) -> None:
    model, fused = chain(between), Fused()
    x = torch.randn(2, 8, 6, 7)
    try:
        expected = model(x.clone())
    except RuntimeError as error:
        pytest.fail(f"the test's own model: {error}")
    actual = compiled(model, fused)(x.clone())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    """A chain with a layer scale as timm's LayerScale2d computes it."""

    def __init__(self, gamma: torch.Tensor, in_place: bool, before_norm: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(gamma)
        self.in_place = in_place
        self.before_norm = before_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convs[1](self.convs[0](x).relu())
        y = self.norm(self.scaled(y)) if self.before_norm else self.scaled(self.norm(y))
        z: torch.Tensor = self.convs[2](y + x)
        return z

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.view(1, -1, 1, 1)
        return y.mul_(gamma) if self.in_place else y * gamma


@pytest.mark.parametrize(
    ("gamma", "in_place", "before_norm", "alone"),
    [
        (torch.rand(8) + 0.5, False, False, True),
        (torch.rand(8) + 0.5, True, False, True),
        (torch.rand(8) + 0.5, False, True, False),
        (torch.rand(1) + 0.5, False, False, False),
    ],
    ids=["apart", "in place", "before the norm", "one factor for all"],
)
def test_a_layer_scale_is_folded_where_it_is_one(
    gamma: torch.Tensor, in_place: bool, before_norm: bool, alone: bool
) -> None:
    model: Any = randomize_(Scaled(gamma, in_place, before_norm).eval(), channels=8)
    fused, x = Fused(), torch.randn(2, 8, 6, 7)
    network = compiled(model, fused)
    for _ in range(2):
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
        model.gamma.mul_(2)
    assert (fused.calls() == [subnetwork]) is alone


def test_promoting_factors_keep_their_dtype() -> None:
    model: Any = randomize_(Scaled(torch.rand(8) + 0.5, in_place=False, before_norm=False).eval(), channels=8)
    model, x = model.bfloat16(), torch.randn(2, 8, 6, 7).bfloat16()
    model.gamma.data = model.gamma.float()
    network = compiled(lambda x: model.scaled(model.convs[2](model.convs[1](model.convs[0](x)))), Fused())
    assert network(x).dtype == torch.float32


def test_floats_that_dynamic_makes_symbols_are_asked_for() -> None:
    model, fused = chain(BETWEEN["relu6"]), Fused()
    network = compiled(model, fused, dynamic=True)
    for size in ((2, 8, 6, 7), (3, 8, 5, 9)):
        torch.testing.assert_close(network(torch.ones(size)), model(torch.ones(size)), rtol=1e-4, atol=1e-4)
    assert subnetwork in fused.calls()
    model.norm.eps = 0.5
    torch.testing.assert_close(network(torch.ones(size)), model(torch.ones(size)), rtol=1e-4, atol=1e-4)


def test_every_map_that_is_read_elsewhere_is_handed_out() -> None:
    model, fused = chain(), Fused()

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        first = model.norm(model.convs[0](x))
        second = model.convs[1](first).relu()
        third = model.convs[2](second)
        pooled = F.adaptive_avg_pool2d(third, 1)
        return [first, second.exp(), third, pooled, pooled.flatten(1)]

    x = torch.randn(2, 8, 6, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        found, expected = compiled(call, fused)(x.contiguous(memory_format=layout)), call(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert fused.calls().count(subnetwork) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    model, fused = chain(BETWEEN["relu6"]).to(dtype), Fused()
    x = torch.randn(2, 8, 6, 7).to(dtype)
    assert_exact(model, compiled(model, fused)(x), x, roundings=6)
    assert subnetwork in fused.calls()


class TestChanges:
    def test_weights_that_change_are_seen(self) -> None:
        model, fused = chain(), Fused()
        network, x = compiled(model, fused), torch.randn(2, 8, 6, 7)
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda: model.convs[1].weight.mul_(1.5),
            lambda: model.norm.running_var.add_(1.0),
            lambda: setattr(model.convs[2], "weight", nn.Parameter(torch.randn(8, 8, 1, 1))),
            lambda: setattr(model.convs[0], "weight", nn.Parameter(torch.randn(8, 8, 1, 1))),
            lambda: setattr(model.convs[2].weight, "data", torch.randn(8, 8, 1, 1)),
            lambda: model.load_state_dict(chain().state_dict(), assign=True),
            # in place through `.data` leaves no trace
            lambda: (model.convs[3].weight.data.mul_(2), mnv4_kernels.refresh(model)),
        ]
        for change in changes:
            change()
            for _ in range(2):
                torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
        assert len(fused.graphs) == 1

    def test_a_weight_written_in_the_graph_is_seen(self) -> None:
        model = chain()

        def call(x: torch.Tensor) -> torch.Tensor:
            y = model(x)
            model.convs[1].weight.mul_(2)
            return y + model(x)

        twin, x = copy.deepcopy(model), torch.randn(2, 8, 6, 7)
        network = torch.compile(call, backend=backend, fullgraph=True)
        for _ in range(2):
            expected = twin(x)
            twin.convs[1].weight.mul_(2)
            torch.testing.assert_close(network(x), expected + twin(x), rtol=1e-4, atol=1e-4)

    def test_weights_of_inference_mode_are_read_at_each_call(self) -> None:
        with torch.inference_mode():
            model, fused = chain(), Fused()
            network, x = compiled(model, fused), torch.randn(2, 8, 6, 7)
            for _ in range(2):
                torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
                model.convs[1].weight.mul_(2)
        assert subnetwork in fused.calls()

    def test_models_of_one_code_meet_no_weights_of_each_other(self) -> None:
        models = [chain(), chain()]
        network, x = compiled(lambda model, x: model(x), Fused()), torch.randn(2, 8, 6, 7)
        for model in (*models, *models):
            torch.testing.assert_close(network(model, x), model(x), rtol=1e-4, atol=1e-4)


class TestDeclines:
    def found(self, call: Callable[..., Any], *arguments: torch.Tensor) -> list[str]:
        """The reasons for leaving the graph of a call alone."""
        reasons: list[list[str]] = []

        def look(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            reasons.append(obstacles(graph.graph))
            before = str(graph.graph)
            FuseConvolutions()(graph.graph)
            assert not reasons[-1] or str(graph.graph) == before
            return graph.forward

        torch.compile(call, backend=look)(*arguments)
        return [reason for found in reasons for reason in found]

    def test_gradients(self) -> None:
        model, x = chain(), torch.randn(2, 8, 6, 7)
        assert self.found(model, x) == []
        torch.compiler.reset()
        with torch.enable_grad():
            assert "an input or parameter requires them" in self.found(model, x)[0]
            torch.compiler.reset()
            assert self.found(model.requires_grad_(False), x) == []
            torch.compiler.reset()
            assert "an input or parameter requires them" in self.found(model, x.requires_grad_())[0]

    def test_autocast_and_switches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = chain(), torch.randn(2, 8, 6, 7)
        with torch.autocast("cpu", torch.bfloat16):
            assert self.found(model, x) == ["under autocast"]
        torch.compiler.reset()
        monkeypatch.setenv("MNV4_KERNELS_DISABLE", "1")
        assert self.found(model, x) == ["turned off by MNV4_KERNELS_DISABLE=1"]

    def test_modes_inside_the_graph(self) -> None:
        model = chain()

        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y: torch.Tensor = model(x)
            return y

        assert self.found(call, torch.randn(2, 8, 6, 7)) == ["the graph changes modes (_enter_autocast)"]

    def test_few_convolutions_grouped_ones_and_other_dtypes(self) -> None:
        few = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).eval()
        grouped = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=2) for _ in range(3))).eval()
        for model, x in ((few, torch.randn(2, 8, 9, 9)), (grouped, torch.randn(2, 8, 9, 9))):
            fused = Fused()
            assert torch.equal(compiled(model, fused)(x), model(x))
            assert subnetwork not in fused.calls()
        model, fused = chain().double(), Fused()
        compiled(model, fused)(torch.randn(2, 8, 6, 7).double())
        assert subnetwork not in fused.calls()


def test_train_mode_and_gradients_are_inductors() -> None:
    model = chain(BETWEEN["relu"])
    network, x = torch.compile(model, backend=backend, fullgraph=True), torch.randn(2, 8, 6, 7)
    with torch.enable_grad():
        network(x).square().sum().backward()
        actual = [parameter.grad for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        expected = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_op_keeps_its_contract() -> None:
    model, fused = chain(BETWEEN["relu"]), Fused()
    compiled(model, fused)(torch.randn(2, 8, 6, 7))
    (node,) = (node for node in fused.graphs[0].graph.nodes if node.target is subnetwork)
    weights = [torch.randn(value.meta["example_value"].shape).abs() for value in node.args[1]]
    for x in (torch.randn(2, 8, 6, 7), torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(subnetwork, (x, weights, *node.args[2:]))


def test_graphs_are_cached_on_disk_by_what_the_pass_does() -> None:
    model, x = chain(), torch.randn(2, 8, 6, 7)
    expected = model(x)
    results = []
    for _ in range(2):
        torch.compiler.reset()
        results.append(torch.compile(model, backend=backend)(x))
    torch.testing.assert_close(results, [expected] * 2, rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0
    assert FuseConvolutions().uuid() == FuseConvolutions().uuid()


def test_the_backend_takes_modes_options_and_others_passes() -> None:
    seen: list[int] = []

    class Counter(FuseConvolutions):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(sum(node.target is subnetwork for node in graph.nodes))

    model, x = chain(), torch.randn(2, 8, 6, 7)
    options = {"pre_grad_custom_pass": Counter(), "max_autotune": False}
    network = torch.compile(model, backend=backend, options=options)
    # a graph that an earlier run has left on disk meets no pass
    with fresh_cache():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
    assert seen == [1]


FOUND_BY_NAME = """
import sys, torch
torch.set_grad_enabled(False)
model = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 1) for _ in range(4))).eval()
assert "mnv4_kernels" not in sys.modules
assert "mnv4_kernels" in torch.compiler.list_backends()
x = torch.randn(2, 8, 6, 7)
from torch._inductor.utils import run_and_get_code
y, (code,) = run_and_get_code(torch.compile(model, backend="mnv4_kernels"), x)
torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
assert "torch.ops.mnv4_kernels.subnetwork" in code
"""


def test_it_is_found_by_its_name_without_an_import(tmp_path: Path) -> None:
    # what an installation leaves behind: the package on the path and its metadata
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    # the tested package: a checkout beside an installed one has no compiled extension
    installed = Path(mnv4_kernels.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(installed)])}
    command = [sys.executable, "-c", FOUND_BY_NAME]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_results_lie_as_inputs_do() -> None:
    model, fused = chain(BETWEEN["relu"]), Fused()
    x = torch.randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    assert_same_strides(tensors_of(compiled(model, fused)(x)), tensors_of(model(x)))
