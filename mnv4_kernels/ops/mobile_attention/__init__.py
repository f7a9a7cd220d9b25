"""The whole MobileAttention block: norm, queries, shared keys and values, attention, output, layer scale, residual."""

from .contract import mobile_attention

__all__ = ["mobile_attention"]
