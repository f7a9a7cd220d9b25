"""torch.compile of a patched model: our ops in one graph for all sizes, nothing around them, never stale."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import HYBRID, NAMES, SMALL, assert_same_strides, create, images, randomize_, tensors_of
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import mnv4_kernels as mk
from mnv4_kernels.ops.piece import piece

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

#: sizes that torch.compile gives symbols of their own: neither 1 nor equal to each other
SIZES = ((2, 3, 64, 96), (3, 3, 47, 65), (5, 3, 96, 33))

#: a network of one piece, and one whose pieces are its blocks
WHOLE: dict[str, Any] = {}
BLOCKS: dict[str, Any] = {"features_only": True}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def patched(name: str = SMALL, **options: Any) -> Any:
    model = create(name, **options)
    mk.patch(model)
    return model


class Recorder:
    """A backend that runs the graph as it is and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def pieces(self) -> list[int]:
        """How many pieces run by their plans in each graph."""
        return [sum(node.target is piece for node in graph.graph.nodes) for graph in self.graphs]


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, **{"fullgraph": True, "backend": "aot_eager", **options})


def assert_same(actual: Any, expected: Any) -> None:
    assert all(map(torch.equal, tensors_of(actual), tensors_of(expected)))
    assert_same_strides(actual, expected)


def slow_but(*quick: str) -> list[Any]:
    """All models; the default run takes the `quick` ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", slow_but(SMALL, HYBRID, "mobilenetv4_conv_blur_medium"))
def test_every_model_is_one_graph_of_nothing_but_pieces_for_all_sizes(name: str) -> None:
    model, recorder = patched(name), Recorder()
    network = compiled(model, dynamic=True, backend=recorder)
    for size in SIZES[:2]:
        assert_same(network(images(*size)), model(images(*size)))
    (graph,) = recorder.graphs
    calls = {node.target for node in graph.graph.nodes if node.op != "placeholder" and node.op != "output"}
    assert {target for target in calls if target is not getattr} == {piece}


@pytest.mark.parametrize("options", [WHOLE, BLOCKS, {"num_classes": 0}, {"pad_type": "same"}], ids=str)
@pytest.mark.parametrize("name", [SMALL, pytest.param(HYBRID, marks=pytest.mark.slow)])
def test_a_compiled_result_is_eagers_to_the_bit(name: str, options: dict[str, Any]) -> None:
    model, recorder = patched(name, **options), Recorder()
    network = compiled(model, backend=recorder)
    for x in (images(), images().contiguous(memory_format=torch.channels_last)):
        assert_same(network(x), model(x))
    assert all(recorder.pieces())


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates"])
def test_the_other_ways_into_a_network_compile(method: str) -> None:
    model, recorder = patched(), Recorder()
    call = getattr(model, method)
    assert_same(compiled(lambda x: call(x), backend=recorder)(images()), call(images()))
    assert recorder.pieces()[0] > 1


@pytest.mark.parametrize("options", [WHOLE, BLOCKS, {"pad_type": "same"}], ids=str)
@pytest.mark.parametrize("name", [HYBRID, pytest.param(SMALL, marks=pytest.mark.slow)])
def test_one_compilation_serves_all_sizes(name: str, options: dict[str, Any]) -> None:
    model, recorder = patched(name, **options), Recorder()
    network = compiled(model, dynamic=True, backend=recorder)
    for size in SIZES:
        assert_same(network(images(*size)), model(images(*size)))
    assert len(recorder.graphs) == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("axes", [(0,), (2, 3), (0, 2, 3)], ids=str)
def test_marked_axes_are_served_by_one_compilation(axes: tuple[int, ...]) -> None:
    model, recorder = patched(HYBRID), Recorder()
    network = compiled(model, dynamic=None, backend=recorder)
    for size in SIZES:
        shape = [size[axis] if axis in axes else SIZES[0][axis] for axis in range(4)]
        x = images(*shape)
        for axis in axes:
            torch._dynamo.mark_dynamic(x, axis)
        assert_same(network(x), model(x))
    assert len(recorder.graphs) == 1


def watched(model: Any) -> tuple[Any, list[list[str]]]:
    """`model` compiled for all sizes, and a list that gets what each of its compilations guards."""
    compilations: list[list[str]] = []

    def keep(entries: Any) -> list[bool]:
        compilations.append([entry.name for entry in entries])
        return [True] * len(entries)

    return compiled(model, dynamic=True, options={"guard_filter_fn": keep}), compilations


def guarded(model: Any) -> list[str]:
    """What the only compilation of a patched `model` guards, after calls at all sizes and other weights."""
    network, compilations = watched(model)
    for size in SIZES:
        network(images(*size))
    load_another(model)
    step(model)
    assert_same(network(images()), model(images()))
    (guards,) = compilations
    return guards


def test_guards_grow_with_neither_the_network_nor_the_calls() -> None:
    small, large = (guarded(patched(name)) for name in (SMALL, HYBRID))
    assert len(small) == len(large)
    assert not [name for name in large if "_parameters" in name or "_buffers" in name]


@pytest.mark.slow
def test_networks_that_run_block_by_block_guard_a_fraction_of_what_timms_do() -> None:
    network, compilations = watched(create(HYBRID, **BLOCKS))
    network(images())
    assert 8 * len(guarded(patched(HYBRID, **BLOCKS))) < len(compilations[0])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("mode", ["default", pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_inductor_adds_no_kernel_to_a_whole_network(mode: str, layout: torch.memory_format) -> None:
    model, x = patched(), images().contiguous(memory_format=layout)
    result, (code,) = run_and_get_code(torch.compile(model, fullgraph=True, mode=mode), x)
    assert_same(result, model(x))
    assert calls_of(code) == ["torch.ops.mnv4_kernels.piece.default"]


@pytest.mark.parametrize(
    "layout", [torch.channels_last, pytest.param(torch.contiguous_format, marks=pytest.mark.slow)], ids=str
)
def test_inductor_converts_nothing_but_what_is_handed_out(layout: torch.memory_format) -> None:
    model, x = patched(SMALL, **BLOCKS), images().contiguous(memory_format=layout)
    result, (code,) = run_and_get_code(compiled(model, backend="inductor", dynamic=True), x)
    assert_same(result, model(x))
    others = [call for call in calls_of(code) if call != "torch.ops.mnv4_kernels.piece.default"]
    # maps are NHWC inside: they are handed out as timm does, in the format of the input
    assert len(others) == (0 if layout is torch.channels_last else len(result))


def test_inductor_gives_a_piece_the_layout_that_it_finds() -> None:
    model = patched(SMALL, **BLOCKS)
    conv = nn.Conv2d(3, 3, 3, padding=1).eval().to(memory_format=torch.channels_last)
    result, (code,) = run_and_get_code(
        compiled(lambda x: model(conv(x)), backend="inductor"), images().contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(result, model(conv(images())), rtol=1e-4, atol=1e-4)
    assert not [call for call in calls_of(code) if "clone" in call or "copy" in call]


class Between(nn.Module):
    """Our ops between convolutions that inductor computes in NHWC, whatever the images' format."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.depthwise = nn.Parameter(torch.randn(32, 1, 3, 3))
        self.pointwise = nn.Parameter(torch.randn(32, 32, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = mk.functional.dwconv_bn_act(self.first(x), self.depthwise, act="relu", padding=1)
        y = mk.functional.pwconv_bn_act(y, self.pointwise)
        z: torch.Tensor = self.last(y)
        return z


def test_inductor_copies_no_map_round_a_bare_op() -> None:
    # the trap: convolutions become NHWC, and their neighbours' inputs are copied back to the NCHW that eager has
    model, x = Between().eval(), torch.randn(2, 16, 20, 24)
    # graphs on disk don't know the ops' tags
    network = torch.compile(model, fullgraph=True, options={"fx_graph_cache": False})
    result, (code,) = run_and_get_code(network, x)
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4)
    assert "dwconv_bn_act.default" in code
    images_nhwc, map_nchw = "(2, 16, 20, 24), (7680, 1, 384, 16)", "(2, 32, 20, 24), (15360, 480, 24, 1)"
    assert images_nhwc in code
    assert map_nchw not in code


def calls_of(code: str) -> list[str]:
    """The kernels and ops that a generated graph calls, in order."""
    body = code[code.index("def call(") : code.index("runner = Runner")]
    found = re.findall(r"(torch\.ops\.[\w.]+|cpp_fused\w+|extern_kernels\.\w+|aten\.\w+)\(", body)
    return [call for call in found if "assert" not in call]


def another(model: Any) -> dict[str, torch.Tensor]:
    """The state of a model of the same structure with other values."""
    twin = mk.unpatch(copy.deepcopy(model))
    for parameter in twin.parameters():
        parameter.mul_(1.25)
    return randomize_(twin, seed=5).state_dict()


def load_another(model: Any) -> None:
    model.load_state_dict(another(model))


def assign_another(model: Any) -> None:
    model.load_state_dict(another(model), assign=True)


def step(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()


def edit_in_place(model: Any) -> None:
    model.blocks[1][0].conv.weight.mul_(1.5)


def give_other_memory(model: Any) -> None:
    weight = model.blocks[1][0].conv.weight
    weight.data = weight.data * 1.5


def edit_without_a_trace(model: Any) -> None:
    model.blocks[1][0].conv.weight.data.mul_(1.5)
    mk.refresh(model)


def edit_statistics(model: Any) -> None:
    model.bn1.running_var.add_(1.0)


def edit_attribute(model: Any) -> None:
    model.bn1.eps = 0.5


def exchange_module(model: Any) -> None:
    model.blocks[2][0].dw_mid.bn.act = nn.GELU()


def hook_inside(model: Any) -> None:
    model.blocks[2][0].pw_exp.register_forward_hook(lambda module, arguments, y: y * 1.5)


def train_inside(model: Any) -> None:
    model.blocks[2][0].dw_mid.bn.train()


@pytest.mark.parametrize("options", [WHOLE, pytest.param(BLOCKS, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        load_another,
        assign_another,
        step,
        edit_in_place,
        give_other_memory,
        edit_without_a_trace,
        edit_statistics,
        edit_attribute,
        exchange_module,
        hook_inside,
        train_inside,
    ],
)
def test_a_change_after_compilation_is_seen(change: Callable[[Any], None], options: dict[str, Any]) -> None:
    model = patched(SMALL, **options)
    network = compiled(model)
    before = tensors_of(network(images()))
    change(model)
    twin = mk.unpatch(copy.deepcopy(model))
    after, expected = tensors_of(network(images())), tensors_of(twin(images()))
    assert not torch.equal(after[-1], before[-1])
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_unpatching_after_compilation_gives_timms_graph() -> None:
    model, recorder = patched(), Recorder()
    network = compiled(model, backend=recorder)
    network(images())
    mk.unpatch(model)
    assert torch.equal(network(images()), model(images()))
    assert recorder.pieces() == [1, 0]


def test_a_switch_set_after_compilation_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    network = compiled(model)
    network(images())
    monkeypatch.setenv("MNV4_KERNELS_DISABLE", "1")
    assert torch.equal(network(images()), mk.unpatch(copy.deepcopy(model))(images()))


def test_a_stride_changed_after_compilation_raises() -> None:
    model = patched(SMALL, **BLOCKS)
    network = compiled(model, backend="inductor")
    network(images())
    model.conv_stem.stride = (1, 1)
    with pytest.raises((AssertionError, RuntimeError), match=r"size|stride"):
        network(images())


def write_a_parameter(model: Any, x: torch.Tensor) -> Any:
    model.classifier.weight.mul_(2)
    return model(x)


def write_through_a_view(model: Any, x: torch.Tensor) -> Any:
    model.classifier.weight.detach()[0].mul_(2)
    return model(x)


def put_another_buffer(model: Any, x: torch.Tensor) -> Any:
    model.bn1.running_mean = x.mean((0, 2, 3)).repeat(11)[: model.bn1.num_features]
    return model(x)


def set_an_attribute(model: Any, x: torch.Tensor) -> Any:
    model.bn1.eps = 0.5
    return model(x)


def give_other_parameters(model: Any, x: torch.Tensor) -> Any:
    return torch.func.functional_call(model, {name: value * 1.01 for name, value in model.named_parameters()}, (x,))


def map_over_the_batch(model: Any, x: torch.Tensor) -> Any:
    return torch.func.vmap(lambda image: model(image))(x.unsqueeze(1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "call",
    [
        write_a_parameter,
        write_through_a_view,
        put_another_buffer,
        set_an_attribute,
        pytest.param(give_other_parameters, marks=pytest.mark.slow),
        map_over_the_batch,
    ],
)
def test_an_edit_in_the_same_graph_is_seen(call: Callable[..., Any], backend: str) -> None:
    model = patched()
    twin = mk.unpatch(copy.deepcopy(model))
    actual = compiled(lambda x: call(model, x), backend=backend)(images())
    torch.testing.assert_close(actual, call(twin, images()), rtol=1e-4, atol=1e-4)


def test_an_edit_later_in_the_same_graph_leaves_the_ops() -> None:
    model, recorder = patched(), Recorder()
    expected = model(images())

    def call(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = model(x)
        model.classifier.weight.mul_(2)
        return y

    network = compiled(call, backend=recorder)
    torch.testing.assert_close(network(images()), expected)
    torch.testing.assert_close(network(images()), model(images()) - 0 * expected, rtol=1, atol=1e9)
    assert recorder.pieces()[0] == 1


def test_copies_and_siblings_meet_no_code_of_each_other() -> None:
    first = patched()
    models = [first, copy.deepcopy(first), patched(SMALL, seed=1)]
    edit_in_place(models[1])
    network = compiled(lambda model, x: model(x))
    for model in (*models, *models):
        assert torch.equal(network(model, images()), model(images()))


def test_a_model_that_ended_leaves_no_compiled_code_for_its_successor() -> None:
    network = compiled(lambda model, x: model(x))
    for seed in range(3):
        model = patched(SMALL, seed=seed)
        assert torch.equal(network(model, images()), model(images()))
        del model


def test_a_part_of_a_larger_model_compiles() -> None:
    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = patched(SMALL, **BLOCKS)
            self.head = nn.Linear(self.backbone.feature_info.channels()[-1], 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.backbone(x)[-1].mean((2, 3)))
            return y

    model, recorder = Larger().eval(), Recorder()
    torch.testing.assert_close(compiled(model, backend=recorder)(images()), model(images()))
    assert recorder.pieces()[0] > 1


class TestTimmsPath:
    def test_train_mode_and_gradients_trace_timms_formula(self) -> None:
        model, recorder = patched(), Recorder()
        network = compiled(model, backend=recorder)
        with torch.enable_grad():
            network(images()).sum().backward()
            assert model.conv_stem.weight.grad is not None
            model.train()
            network(images())
        assert recorder.pieces() == [0, 0]
        model.eval()
        network(images())
        assert recorder.pieces() == [0, 0, 1]

    def test_other_inputs_and_dtypes_are_timms(self) -> None:
        model, recorder = create(SMALL).double(), Recorder()
        mk.patch(model)
        assert torch.equal(compiled(model, backend=recorder)(images().double()), model(images().double()))
        assert recorder.pieces() == [0]

    def test_bfloat16_runs_the_ops(self) -> None:
        model, recorder = patched().bfloat16(), Recorder()
        assert_same(compiled(model, backend=recorder)(images().bfloat16()), model(images().bfloat16()))
        assert recorder.pieces() == [1]
