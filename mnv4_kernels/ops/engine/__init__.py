"""A whole network in one call: see `mnv4_kernels.engine`."""

from .contract import engine_profile, engine_run, program_pack, program_run
from .handle import Engine
from .kept import kept
from .programs import encode

__all__ = ["Engine", "encode", "engine_profile", "engine_run", "kept", "program_pack", "program_run"]
