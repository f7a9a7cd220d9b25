"""What can run `pwconv_bn_act`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import pwconv_bn_act

BACKENDS = (cpp(pwconv_bn_act), triton("pwconv_bn_act"))
