"""A whole network in one call: see `mnv4_kernels.engine`."""

from .contract import engine_profile, engine_run, program_pack, program_run
from .handle import Engine
from .kept import kept
from .programs import encode
from .weights import Array, Weight, made

__all__ = [
    "Array",
    "Engine",
    "Weight",
    "encode",
    "engine_profile",
    "engine_run",
    "kept",
    "made",
    "program_pack",
    "program_run",
]
