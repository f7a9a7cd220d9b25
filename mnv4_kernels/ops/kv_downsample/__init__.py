"""Key and value of one read of x: depthwise + BatchNorm + 1x1, two weight sets."""

from .contract import kv_downsample

__all__ = ["kv_downsample"]
