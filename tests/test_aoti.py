"""AOTInductor: an exported network runs from a package, in Python and in a C++ program without Python."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import needs_engine
from models import SMALL, create, images
from torch.utils import cpp_extension

import mnv4_kernels as mk
from mnv4_kernels.backends import native

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

OPEN = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
MAIN = Path(__file__).parent / "aoti" / "main.cpp"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def package(model: Any, folder: Path) -> str:
    program = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes={"x": OPEN})
    path: str = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return path


@pytest.mark.parametrize("strict", [False, True])
def test_an_optimized_network_is_exported_with_its_packed_weights(strict: bool) -> None:
    fast = mk.optimize(create(SMALL))
    program = torch.export.export(fast, (images(2, 3, 64, 96),), dynamic_shapes={"x": OPEN}, strict=strict)
    assert [str(node.target) for node in program.graph.nodes if "mnv4" in str(node.target)] == [
        "mnv4_kernels.program_run.default"
    ]
    for size in ((2, 3, 64, 96), (3, 3, 47, 65)):
        assert torch.equal(program.module()(images(*size)), fast(images(*size)))


@pytest.mark.slow
def test_a_package_runs_in_python_and_in_cpp(tmp_path: Path) -> None:
    fast = mk.optimize(create(SMALL))
    path = package(fast, tmp_path)
    loaded = torch._inductor.aoti_load_package(path)
    for size in ((2, 3, 64, 96), (3, 3, 47, 65)):
        assert torch.equal(loaded(images(*size)), fast(images(*size)))
    x = images(2, 3, 64, 96)
    x.numpy().tofile(tmp_path / "input")
    fast(x).numpy().tofile(tmp_path / "expected")
    program = build(tmp_path)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked
    arguments = [program, native.LIBRARY, path, tmp_path / "input", tmp_path / "expected"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_package_of_a_patched_model_follows_its_constants(tmp_path: Path) -> None:
    model = create(SMALL)
    mk.patch(model)
    loaded = torch._inductor.aoti_load_package(package(model, tmp_path))
    for size in ((2, 3, 64, 96), (3, 3, 47, 65)):
        assert torch.equal(loaded(images(*size)), model(images(*size)))


def build(folder: Path) -> Path:
    """The C++ program, linked with libtorch alone."""
    # a package's own library asks for libtorch.so by name, which must be loaded by then
    (library,) = cpp_extension.library_paths()
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    output = folder / "main"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", abi, *includes, MAIN, "-o", output]
    libraries = [
        f"-L{library}",
        f"-Wl,-rpath,{library}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    subprocess.run([*command, *libraries], check=True)
    return output
