"""What can run `head`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import head

BACKENDS = (cpp(head), triton("head"))
