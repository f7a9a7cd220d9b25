"""What can run `uib`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import uib

BACKENDS = (cpp(uib), triton("uib"))
