"""A piece of a patched model as one op, for the graphs of torch.compile."""

from .contract import piece
from .owners import Owner, owner_of, remember

__all__ = ["Owner", "owner_of", "piece", "remember"]
