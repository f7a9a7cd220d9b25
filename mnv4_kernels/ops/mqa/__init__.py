"""Multi-query attention: many query heads over one shared key and value."""

from .contract import mqa, mqa_backward

__all__ = ["mqa", "mqa_backward"]
