"""What can run `kv_downsample`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import kv_downsample

BACKENDS = (cpp(kv_downsample), triton("kv_downsample"))
