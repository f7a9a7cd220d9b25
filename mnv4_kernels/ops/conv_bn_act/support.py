"""What can run `conv_bn_act`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import conv_bn_act

BACKENDS = (cpp(conv_bn_act), triton("conv_bn_act"))
