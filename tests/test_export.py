"""torch.export of a patched model: our ops, sizes left open, weights that follow the exported program's own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import HYBRID, NAMES, SMALL, create, images, tensors_of

import mnv4_kernels as mk
from mnv4_kernels.ops.engine import made
from mnv4_kernels.testing import poisoned_memory

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

OPEN = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def patched(name: str = SMALL, **options: Any) -> Any:
    model = create(name, **options)
    mk.patch(model)
    return model


def export(model: Any, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes={"x": OPEN}, strict=strict)


def ops_of(program: torch.export.ExportedProgram) -> list[str]:
    names = (str(node.target) for node in program.graph.nodes)
    return [name.split(".")[1] for name in names if name.startswith("mnv4_kernels.")]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_network_is_exported_as_one_program_for_all_sizes(strict: bool) -> None:
    model = patched()
    program = export(model, strict)
    assert ops_of(program) == ["program_pack", "program_run"]
    for size in ((2, 3, 64, 96), (3, 3, 47, 65)):
        assert torch.equal(program.module()(images(*size)), model(images(*size)))
    assert set(program.state_dict) == set(model.state_dict())
    # the program is a function of its own weights
    module = program.module()
    other = create(SMALL, seed=4)
    # counters that nothing reads are left out by strict export
    module.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(module(images()), other(images()), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "strict"),
    [
        *((name, {}, False) for name in NAMES),
        (HYBRID, {"features_only": True}, False),
        # two stages have sizes that are rounded up; all five take minutes to export
        (SMALL, {"features_only": True, "pad_type": "same", "out_indices": (0, 1)}, False),
        # one of each kind of block and pool: what strict export reads is the code around them
        (HYBRID, {}, True),
        (HYBRID, {"features_only": True}, True),
        (SMALL, {"features_only": True, "pad_type": "same", "out_indices": (0, 1)}, True),
        ("mobilenetv4_conv_aa_medium", {}, True),
        ("mobilenetv4_conv_blur_medium", {}, True),
    ],
)
def test_whatever_is_patched_is_exported(name: str, options: dict[str, Any], strict: bool) -> None:
    model = patched(name, **options)
    program = export(model, strict)
    assert ops_of(program)
    x = images(3, 3, 47, 65)
    for actual, expected in zip(tensors_of(program.module()(x)), tensors_of(model(x)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_exported_program_is_saved_and_loaded() -> None:
    model = patched()
    file = io.BytesIO()
    torch.export.save(export(model), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.equal(loaded.module()(images()), model(images()))


@pytest.mark.slow
def test_hooks_modes_and_switches_export_timms_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    handle = model.blocks[1][0].conv.register_forward_hook(lambda module, arguments, y: y * 2)
    assert "program_run" not in ops_of(export(model))
    handle.remove()
    monkeypatch.setenv("MNV4_KERNELS_DISABLE", "1")
    assert ops_of(export(model)) == []
    monkeypatch.undo()
    assert ops_of(export(model.train())) == []


def test_the_ops_of_a_program_keep_their_contract() -> None:
    module = export(patched()).module()
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "mnv4_kernels":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Calls():
        module(images())
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
    with poisoned_memory():
        assert torch.equal(module(images()), module(images()))


def test_weights_that_change_in_place_are_read_anew() -> None:
    pack, run = (getattr(torch.ops.mnv4_kernels, name).default for name in ("program_pack", "program_run"))
    program = export(patched())
    graph = program.graph
    (node,) = (node for node in graph.nodes if node.target is run)
    text = node.args[0]

    def arrays_of(model: Any) -> list[torch.Tensor]:
        body = model._mnv4_body("whole")
        return [made(array) for array in body.fused[0]._builder().arrays]

    first, second = (patched(SMALL, seed=seed) for seed in (0, 1))
    packed = pack(text, arrays_of(first), False)
    assert torch.equal(run(text, packed, images(), False, 0)[0], first(images()))
    packed.copy_(pack(text, arrays_of(second), False))
    assert torch.equal(run(text, packed, images(), False, 0)[0], second(images()))


@pytest.mark.parametrize(
    ("program", "message"),
    [("1 2 x", "must be rows of integers"), ("1 2 3", r"must have rows of \d+ integers"), ("", "must have rows")],
)
def test_what_is_no_program_is_refused(program: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnv4_kernels.program_pack(program, [torch.zeros(3)], False)


def test_packed_weights_of_another_program_are_refused() -> None:
    text = next(node.args[0] for node in export(patched()).graph.nodes if "program_run" in str(node.target))
    with pytest.raises(RuntimeError, match=r"`packed` must be the \d+ bytes that program_pack gives"):
        torch.ops.mnv4_kernels.program_run(text, torch.zeros(8, dtype=torch.uint8), images(), False, 0)


def test_a_programs_gradients_are_refused() -> None:
    module = export(patched()).module()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a program of the engine has no gradients"):
        module(images().requires_grad_()).sum().backward()
