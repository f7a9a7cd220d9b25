"""Query projection, multi-query attention and output projection in one pass: a MobileAttention behind its keys."""

from .contract import mqa_projected

__all__ = ["mqa_projected"]
