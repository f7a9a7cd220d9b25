"""torch.compile takes an optimized network as one op of known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import HYBRID, SMALL, create, images, tensors_of

import mnv4_kernels as mk
from mnv4_kernels.ops.engine import engine_run
from mnv4_kernels.ops.engine.programs import program_of
from mnv4_kernels.testing import poisoned_memory

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_classes": 0},
    {"features_only": True},
    {"features_only": True, "output_stride": 8},
    {"pad_type": "same"},
)
SIZES = ((2, 3, 64, 64), (1, 3, 47, 65), (3, 3, 33, 96), (0, 3, 64, 64))


class Recorder:
    """A backend that runs the graph as it is and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def runs(self) -> list[int]:
        """How often each graph runs an engine."""
        return [sum(node.target is engine_run for node in graph.graph.nodes) for graph in self.graphs]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((SMALL, options) for options in OPTIONS),
        (HYBRID, {}),
        *(
            pytest.param(name, options, marks=pytest.mark.slow)
            for name in (HYBRID, "mobilenetv4_conv_aa_medium")
            for options in OPTIONS
            if options or name != HYBRID
        ),
    ],
    ids=str,
)
def test_the_shapes_are_known_without_running(name: str, options: dict[str, Any]) -> None:
    fast = mk.optimize(create(name, **options), strict=True)
    (part,) = fast.parts
    for size in SIZES:
        for tag in (0, 1):
            actual = engine_run(part._handle, images(*size), tag)
            fake = program_of(part._handle).output_shapes(size, tag)
            assert [tuple(y.shape) for y in actual] == fake


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_the_op_keeps_its_contract(name: str) -> None:
    (part,) = mk.optimize(create(name)).parts
    for x in (images(), images().contiguous(memory_format=torch.channels_last), images(1, 3, 47, 65).bfloat16()):
        torch.library.opcheck(engine_run, (part._handle, x, 0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_whole_network_is_one_op_of_one_graph(options: dict[str, Any], dynamic: bool) -> None:
    fast = mk.optimize(create(SMALL, **options))
    recorder = Recorder()
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend=recorder)
    # sizes that torch.compile gives symbols of their own: neither 1 nor equal to each other
    sizes = ((2, 3, 64, 96), (3, 3, 47, 65), (5, 3, 96, 33))
    for size in sizes:
        x = images(*size)
        assert all(map(torch.equal, tensors_of(compiled(x)), tensors_of(fast(x))))
    assert recorder.runs() == [1] * (1 if dynamic else len(sizes))


def test_two_networks_through_one_compiled_function_are_kept_apart() -> None:
    first, second = (mk.optimize(create(SMALL, seed=seed)) for seed in (0, 1))
    compiled = torch.compile(lambda net, x: net(x), fullgraph=True, backend="aot_eager")
    for net in (first, second, first):
        assert torch.equal(compiled(net, images()), net(images()))


def test_an_ended_network_leaves_no_compiled_code_for_its_successor() -> None:
    compiled = torch.compile(lambda net, x: net(x), fullgraph=True, backend="aot_eager")
    for seed in range(3):
        net = mk.optimize(create(SMALL, seed=seed))
        assert torch.equal(compiled(net, images()), net(images()))
        del net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_compile(dtype: torch.dtype) -> None:
    fast = mk.optimize(create(SMALL), dtype)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = images().to(dtype).contiguous(memory_format=torch.channels_last)
    assert torch.equal(compiled(x), fast(x))


def test_errors_are_the_same_when_compiled() -> None:
    compiled = torch.compile(mk.optimize(create(SMALL)), backend="aot_eager")
    with pytest.raises(ValueError, match=r"`x` must be a tensor \[N, 3, H, W\]"):
        compiled(images(1, 4, 64, 64))


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_no_element_of_a_result_is_forgotten(name: str) -> None:
    fast = mk.optimize(create(name, features_only=True))
    expected = fast(images(3, 3, 47, 65))
    with poisoned_memory():
        actual = fast(images(3, 3, 47, 65))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_fuses_round_it(dynamic: bool) -> None:
    fast = mk.optimize(create(HYBRID))
    compiled = torch.compile(lambda x: fast(x * 2 + 1).softmax(-1), fullgraph=True, dynamic=dynamic)
    for size in SIZES[:3]:
        torch.testing.assert_close(compiled(images(*size)), fast(images(*size) * 2 + 1).softmax(-1))
