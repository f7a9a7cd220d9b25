"""Builds the C++ library of mnv4_kernels with ninja; everything else is in pyproject.toml.

Two outputs: `mnv4_kernels/lib/libmnv4_kernels_ops.so`, the ops, which touches torch only
through the LibTorch stable ABI and knows no Python, and `mnv4_kernels/_C`, a small
pybind11 module for introspection. Environment:

* ``MNV4_KERNELS_BUILD=0`` leaves the C++ out: a pure Python package.
* ``MNV4_KERNELS_SANITIZE=address,undefined`` builds with those sanitizers.
* ``CXX`` names the compiler, ``MAX_JOBS`` limits the parallel compilations.
* ``_PYTHON_HOST_PLATFORM``, e.g. ``linux-aarch64``, is Python's own word for the machine to build for; torch's folder
  on the path is then that machine's (`tests/emulated.sh`).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
#: The only sources that include torch.
OPS = CSRC / "ops"
OPS_LIBRARY = "libmnv4_kernels_ops.so"
OPS_SOURCES = ("cpu/*.cpp", "kernels/**/*.cpp", "engine/**/*.cpp", "ops/*.cpp")

COMMON_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fno-semantic-interposition", "-Wall", "-Wextra"),
    # error texts name sources by their place in the project, not on the machine that built it
    f"-fmacro-prefix-map={ROOT}/=",
]

#: The oldest torch whose stable ABI the ops library may use: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

_X86 = ("x86_64", "AMD64")
_ARM = ("aarch64", "arm64")
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512_ISA = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# where in a line a tile's loop begins is worth 3% of a network, and is chance otherwise; GCC 12 takes its own headers'
# undefined operands for uninitialised variables
_AVX512 = [*_AVX2, *_AVX512_ISA, "-falign-loops=64", "-Wno-maybe-uninitialized"]

#: ISA tiers: file name suffix -> (machines that have it, compiler flags). A file of another
#: machine's tier is left out; a file without a suffix is compiled for the baseline.
TIERS = {
    "scalar": ((*_X86, *_ARM), ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"]),
    "avx2": (_X86, _AVX2),
    "avx512": (_X86, _AVX512),
    "avx512bf16": (_X86, [*_AVX512, "-mavx512bf16"]),
    "amx": (_X86, [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),
    # not scheduled before registers are given out: GCC would load a whole tile's factors at once and spill sums
    "neon": (_ARM, ["-fno-schedule-insns"]),
}

PURE_PYTHON_HINT = "`MNV4_KERNELS_BUILD=0 pip install .` installs the package without its C++ library."


def tier_flags(source: Path, machine: str) -> list[str] | None:
    """Flags of `source`'s tier, none for a file without one; None if `machine` has no such tier."""
    suffix = source.stem.rpartition("_")[2]
    if suffix not in TIERS:
        return []
    machines, flags = TIERS[suffix]
    return flags if machine in machines else None


def ops_sources(machine: str) -> list[tuple[Path, list[str]]]:
    """Every source of the ops library that `machine` can run, with its tier's flags."""
    found = sorted({path for pattern in OPS_SOURCES for path in CSRC.glob(pattern)})
    flagged = [(path, tier_flags(path, machine)) for path in found]
    return [(path, flags) for path, flags in flagged if flags is not None]


def target_machine() -> str:
    """The machine to build for: this one, unless Python is told otherwise."""
    return sysconfig.get_platform().rpartition("-")[2]


def torch_folder() -> Path:
    """Where torch's headers and libraries are; it is not imported, for it may be another machine's."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"mnv4_kernels needs torch to build: `pip install torch`.\n{PURE_PYTHON_HINT}")
    return Path(spec.origin).parent


def find_compiler() -> str:
    """The C++ compiler's command: `CXX`, or the first of c++, g++ and clang++ on the path."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    tried = f"CXX={wanted}" if wanted else "c++, g++, clang++"
    raise SystemExit(f"mnv4_kernels needs a C++20 compiler, none found (tried {tried}).\n{PURE_PYTHON_HINT}")


def find_ninja() -> str:
    """The ninja executable: the Python package's, or the one on the path."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if not found:
        raise SystemExit(f"mnv4_kernels needs ninja to build: `pip install ninja`.\n{PURE_PYTHON_HINT}")
    return found


def write_ninja_file(build_dir: Path, module_name: str) -> None:
    """Writes `build_dir`/build.ninja, whose default targets are the ops library and `module_name`."""
    import pybind11

    torch_root = torch_folder()
    sanitizers = os.environ.get("MNV4_KERNELS_SANITIZE", "")
    # the unrolled tiles take minutes a file at -O3 once every access is checked, seconds at -O1
    sanitize = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-O1", "-g1"] if sanitizers else []
    # an isolated build has its own torch and Python headers: only who includes them is compiled anew
    torch_flags = [f"-isystem {torch_root / 'include'}", TORCH_TARGET]
    python_headers = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    binding_flags = ["-fvisibility=hidden", *(f"-isystem {path}" for path in python_headers)]

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {find_compiler()}",
        f"flags = {' '.join([*COMMON_FLAGS, *sanitize, f'-I{CSRC}'])}",
        f"ldflags = {' '.join(['-shared', *sanitize])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $tier -c $in -o $out",
        "  description = compile $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $ldflags $in -o $out $libs",
        "  description = link $out",
    ]
    objects = []
    for source, flags in ops_sources(target_machine()):
        objects.append(_compile(lines, source, [*flags, *(torch_flags if source.parent == OPS else [])]))
    library = f"lib/{OPS_LIBRARY}"
    exports = CSRC / "exports.map"
    lines += [
        f"build {library}: link {' '.join(objects)} | {exports}",
        f"  libs = -Wl,-soname,{OPS_LIBRARY} -Wl,--version-script={exports} -Wl,-Bsymbolic-functions "
        f"-Wl,--no-as-needed -L{torch_root / 'lib'} -ltorch_cpu",
    ]
    binding = _compile(lines, CSRC / "bindings.cpp", binding_flags)
    lines += [
        f"build {module_name}: link {binding} | {library}",
        "  libs = -Llib -lmnv4_kernels_ops -Wl,-rpath,'$$ORIGIN/lib'",
        f"default {library} {module_name}",
    ]
    text = "\n".join(lines) + "\n"
    target = build_dir / "build.ninja"
    # an unchanged file keeps its time, so that an incremental build starts at once
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def _compile(lines: list[str], source: Path, flags: list[str]) -> str:
    target = f"obj/{source.relative_to(CSRC).with_suffix('.o')}"
    lines += [f"build {target}: compile {source}", f"  tier = {' '.join(flags)}"]
    return target


class NinjaBuild(build_ext):
    """`build_ext` that hands the whole C++ build to ninja and copies its two outputs."""

    def _target_root(self) -> Path:
        return ROOT if self.inplace or self.editable_mode else Path(self.build_lib)

    def _module_file(self) -> str:
        return Path(self.get_ext_filename("mnv4_kernels._C")).name

    def run(self) -> None:
        """Builds what has changed and puts both files into the package."""
        if not self.extensions:
            return
        # apart, so that a checkout's quick rebuilds and pip's isolated builds (other paths
        # to torch) don't undo each other's objects
        flavour = "inplace" if self.inplace or self.editable_mode else "wheel"
        flavour += os.environ.get("MNV4_KERNELS_SANITIZE", "").replace(",", "-")
        build_dir = Path(self.build_temp).resolve() / f"ninja-{flavour}"
        build_dir.mkdir(parents=True, exist_ok=True)
        write_ninja_file(build_dir, self._module_file())
        command = [find_ninja(), "-C", str(build_dir)]
        if "MAX_JOBS" in os.environ:
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"building mnv4_kernels' C++ library failed, see above.\n{PURE_PYTHON_HINT}")
        package = self._target_root() / "mnv4_kernels"
        _install(build_dir / "lib" / OPS_LIBRARY, package / "lib" / OPS_LIBRARY)
        _install(build_dir / self._module_file(), package / self._module_file())

    def get_outputs(self) -> list[str]:
        """Both files, where this command puts them."""
        if not self.extensions:
            return []
        package = self._target_root() / "mnv4_kernels"
        return [str(package / "lib" / OPS_LIBRARY), str(package / self._module_file())]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is mapped: in-place outputs are written to their place directly."""
        return {}


def _install(built: Path, target: Path) -> None:
    """Copies by rename: a process that has the old file mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(built, staged)
    os.replace(staged, target)


def extensions() -> list[Extension]:
    """One extension that names every C++ file, so that a source distribution carries them."""
    if os.environ.get("MNV4_KERNELS_BUILD", "1") == "0":
        return []
    if sys.platform != "linux":
        print(f"mnv4_kernels: the C++ library is built on Linux only, not on {sys.platform}: pure Python package")
        return []
    files = sorted(path.relative_to(ROOT).as_posix() for path in CSRC.rglob("*") if path.is_file())
    sources = [file for file in files if file.endswith(".cpp")]
    return [Extension("mnv4_kernels._C", sources, depends=[file for file in files if file not in sources])]


# guarded, so that a test can read the flag table
if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
