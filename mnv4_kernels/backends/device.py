"""Facts about the machine, for `info` and for the provenance of measurements."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's model name, with the number of processors this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({usable_cpus()} processors)"


def usable_cpus() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_name() -> str | None:
    """The first CUDA device's name, None without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def version(distribution: str) -> str | None:
    """The installed version of `distribution`, None where it is not installed; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
