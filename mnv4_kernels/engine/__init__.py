"""`optimize`: a MobileNet-V4 as one planned program of the CPU engine."""

from .network import OptimizedNetwork, OptimizeError
from .optimize import optimize

__all__ = ["OptimizeError", "OptimizedNetwork", "optimize"]
