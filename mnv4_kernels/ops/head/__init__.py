"""Global average pool, 1x1 convolution, BatchNorm, activation, classifier."""

from .contract import head

__all__ = ["head"]
