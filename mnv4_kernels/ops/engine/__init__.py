"""A whole network in one call: see `mnv4_kernels.engine`."""

from .contract import engine_profile, engine_run
from .handle import Engine

__all__ = ["Engine", "engine_profile", "engine_run"]
