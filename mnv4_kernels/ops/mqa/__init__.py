"""Multi-query attention: many query heads over one shared key and value."""

from .contract import mqa

__all__ = ["mqa"]
