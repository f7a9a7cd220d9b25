"""What can run `dwconv_bn_act`, best first."""

from __future__ import annotations

from ..support import cpp, triton
from .contract import dwconv_bn_act

BACKENDS = (cpp(dwconv_bn_act), triton("dwconv_bn_act"))
