"""What can run `mqa`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import mqa

BACKENDS = (cpp(mqa), triton("mqa"))
