"""What is built, what is in it, and what happens where parts are missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mnv4_kernels
from mnv4_kernels.backends import device, native

ROOT = Path(__file__).resolve().parent.parent

needs_library = pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons()))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("mnv4_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pure_package(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no built library."""
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(mnv4_kernels.__file__).parent, tmp_path / "mnv4_kernels", ignore=built)
    return tmp_path


def run_python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process that finds the package in `folder` first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        check=False,
    )


class TestFlags:
    def test_a_tier_file_gets_its_instruction_sets_and_no_other_file_does(self, build: ModuleType) -> None:
        assert build.tier_flags(Path("gemm.cpp"), "x86_64") == []
        assert "-mavx2" in build.tier_flags(Path("gemm_avx2.cpp"), "x86_64")
        assert not any("avx512" in flag for flag in build.tier_flags(Path("gemm_avx2.cpp"), "x86_64"))
        assert "-mavx512f" in build.tier_flags(Path("gemm_avx512.cpp"), "x86_64")
        assert "-mavx512bf16" not in build.tier_flags(Path("gemm_avx512.cpp"), "x86_64")
        assert "-mavx512bf16" in build.tier_flags(Path("gemm_avx512bf16.cpp"), "x86_64")

    def test_files_of_another_machines_tiers_are_left_out(self, build: ModuleType) -> None:
        assert build.tier_flags(Path("gemm_avx2.cpp"), "aarch64") is None
        assert build.tier_flags(Path("gemm_neon.cpp"), "x86_64") is None
        assert all("avx" not in path.stem for path, _ in build.ops_sources("aarch64"))

    def test_nothing_is_compiled_for_the_build_machine_alone(self, build: ModuleType) -> None:
        assert "-march=native" not in " ".join(build.COMMON_FLAGS)
        assert not any("native" in flag for _, flags in build.TIERS.values() for flag in flags)

    def test_a_missing_compiler_is_named_with_the_way_out(
        self, build: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(
            SystemExit, match=re.escape("needs a C++20 compiler, none found (tried CXX=no-such-compiler)")
        ):
            build.find_compiler()
        with pytest.raises(SystemExit, match=re.escape("`MNV4_KERNELS_BUILD=0 pip install .`")):
            build.find_compiler()

    def test_build_0_leaves_the_extension_out(self, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [extension.name for extension in build.extensions()] == ["mnv4_kernels._C"]
        monkeypatch.setenv("MNV4_KERNELS_BUILD", "0")
        assert build.extensions() == []

    def test_a_source_distribution_carries_every_cpp_file(self, build: ModuleType) -> None:
        (extension,) = build.extensions()
        listed = {ROOT / name for name in [*extension.sources, *extension.depends]}
        assert {path for path in (ROOT / "csrc").rglob("*") if path.is_file()} == listed


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
class TestLibrary:
    def test_it_takes_only_the_stable_abi_of_torch(self) -> None:
        undefined = symbols(native.LIBRARY, "--undefined-only")
        foreign = [name for name in undefined if re.match(r"(c10|at|torch|caffe2)::|Py[A-Z_]|_Py", name)]
        assert not foreign
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)

    def test_it_shows_nothing_but_its_own_names(self) -> None:
        assert all(name.startswith("mnv4::") for name in symbols(native.LIBRARY, "--defined-only"))

    def test_code_of_a_tier_is_never_shared_with_other_files(self) -> None:
        objects = sorted((ROOT / "build").rglob("*_avx*.o"))
        if not objects:
            pytest.skip("no objects in build/: the library was built elsewhere")
        for path in objects:
            listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
            weak = [line for line in listing.splitlines() if re.search(r" [WVu] ", line)]
            assert not weak, f"the linker may use {path.name}'s copy of {weak[0]} on machines without its tier"


def symbols(library: Path, which: str) -> list[str]:
    """Demangled dynamic symbols."""
    listing = subprocess.run(["nm", "-DC", which, library], capture_output=True, text=True, check=True).stdout
    return [re.split(r" [a-zA-Z] ", line, maxsplit=1)[1] for line in listing.splitlines() if line.strip()]


@needs_library
class TestModule:
    def test_every_tier_can_be_forced_and_the_cap_lifted(self) -> None:
        library = native.module()
        compiled, detected = library.compiled_tiers(), library.detected_tier()
        assert compiled[0] == "scalar"
        try:
            for tier in compiled[: compiled.index(detected) + 1]:
                library.set_tier_cap(tier)
                assert library.active_tier() == tier
        finally:
            library.clear_tier_cap()
        assert library.detected_tier() == detected

    def test_an_unknown_tier_is_named_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"`tier` must be one of scalar, neon, avx2, .*got 'sse9'"):
            native.module().set_tier_cap("sse9")

    def test_the_environment_caps_the_tier(self) -> None:
        code = "from mnv4_kernels.backends import native; print(native.module().active_tier())"
        folder = Path(mnv4_kernels.__file__).parent.parent
        assert run_python(code, folder, MNV4_KERNELS_TIER="scalar").stdout.strip() == "scalar"


class TestWithoutParts:
    def test_without_the_library_the_reasons_are_given_and_the_references_answer(self, pure_package: Path) -> None:
        code = (
            "import torch, mnv4_kernels.ops as ops\n"
            "from mnv4_kernels.backends import native\n"
            "assert not native.available() and len(native.reasons()) == 1\n"
            "x, w = torch.ones(1, 3, 2, 2), torch.ones(4, 3, 1, 1)\n"
            "assert ops.pwconv_bn_act(x, w, None, None, 'relu', None, None).unique().tolist() == [3.0]\n"
            "try: native.module()\n"
            "except RuntimeError as error: print(error)\n"
        )
        result = run_python(code, pure_package)
        assert result.returncode == 0, result.stderr
        assert "not available: the package was installed without it; `pip install .` builds it" in result.stdout

    def test_a_library_that_does_not_load_is_a_reason_not_an_error(self, pure_package: Path) -> None:
        (pure_package / "mnv4_kernels" / "lib").mkdir(exist_ok=True)
        (pure_package / "mnv4_kernels" / "lib" / native.LIBRARY.name).write_bytes(b"not a library")
        code = "import mnv4_kernels.ops; from mnv4_kernels.backends import native; print(native.reasons())"
        result = run_python(code, pure_package)
        assert result.returncode == 0, result.stderr
        assert f"{native.LIBRARY.name} does not load in torch {torch.__version__}" in result.stdout

    def test_in_a_checkout_the_reason_says_how_to_build(self, pure_package: Path) -> None:
        (pure_package / "setup.py").touch()
        result = run_python("from mnv4_kernels.backends import native; print(native.reasons())", pure_package)
        assert "`python setup.py build_ext --inplace` builds it here" in result.stdout

    @pytest.mark.parametrize("missing", ["timm", "triton", "rich", "sklearn"])
    def test_import_and_info_work_without(self, missing: str, pure_package: Path) -> None:
        block = (
            "import sys\n"
            f"sys.modules['{missing}'] = None\n"
            "import mnv4_kernels, mnv4_kernels.functional\n"
            "from mnv4_kernels.cli import main\n"
            "sys.exit(main(['info']))\n"
        )
        result = run_python(block, pure_package)
        assert result.returncode == 0, result.stderr
        assert "C++ library" in result.stdout

    def test_import_loads_neither_timm_nor_triton(self) -> None:
        code = "import sys, mnv4_kernels; print({'timm', 'triton'} & set(sys.modules))"
        # torch itself may import triton
        baseline = "import sys, torch; print({'timm', 'triton'} & set(sys.modules))"
        folder = Path(mnv4_kernels.__file__).parent.parent
        assert run_python(code, folder).stdout == run_python(baseline, folder).stdout

    def test_import_costs_under_50_ms_beyond_torch(self) -> None:
        code = (
            "import time, torch\nstart = time.process_time()\nimport mnv4_kernels\nprint(time.process_time() - start)\n"
        )
        folder = Path(mnv4_kernels.__file__).parent.parent
        # an installed package has its bytecode; a checkout gets it in the first turn
        turns = [run_python(code, folder, PYTHONDONTWRITEBYTECODE="") for _ in range(5)]
        assert min(float(turn.stdout) for turn in turns) < 0.05


def test_the_installed_version_is_the_projects() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert device.version("mnv4_kernels") in (version[1], None)
