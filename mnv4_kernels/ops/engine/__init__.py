"""A whole network in one call: see `mnv4_kernels.engine`."""

from .contract import engine_create, engine_free, engine_profile, engine_run

__all__ = ["engine_create", "engine_free", "engine_profile", "engine_run"]
