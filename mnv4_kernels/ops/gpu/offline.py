"""Compiling a launch for a GPU that is not there: registers, spills and shared memory of a config."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .launch import Launch

#: Shared memory of one program: compute capability 9.0 and 10.0, and the consumer devices of the sm_80 family.
SHARED_LIMIT = 227 * 1024
CONSUMER_SHARED_LIMIT = 99 * 1024


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes."""

    registers: int
    spilled: int
    shared: int

    def problems(self, shared_limit: int = SHARED_LIMIT) -> list[str]:
        """Why this kernel must not ship; empty where it may."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes a lane")
        if self.shared > shared_limit:
            found.append(f"takes {self.shared} bytes of shared memory, more than {shared_limit}")
        return found


@contextmanager
def _target(capability: int) -> Iterator[None]:
    """Makes Triton believe that a device of this capability is current; nothing can be launched meanwhile."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class AbsentDevice(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_device(self) -> str:
            # a key of its own in each kernel's cache, so that no real device ever sees these binaries
            return f"absent sm_{capability}"

        def get_current_stream(self, device: Any) -> int:
            return 0

    before = driver._active
    driver.set_active(AbsentDevice())
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel of a launch on meta tensors, specialised just as a real launch would be."""
    with _target(capability):
        return launch.kernel.run(*launch.arguments, grid=launch.grid, warmup=True, **launch.constants, **launch.options)


def resources(launch: Launch, capability: int) -> Resources:
    """Registers, spilled bytes and shared memory of a launch on a device of this compute capability."""
    compiled = compile_launch(launch, capability)
    registers, spilled = _usage(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
