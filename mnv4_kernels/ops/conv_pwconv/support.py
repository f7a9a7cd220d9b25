"""What can run `conv_pwconv`; on the CPU its parts are ops of their own, which the engine and the drop-ins call."""

from __future__ import annotations

from ..support import triton

BACKENDS = (triton("conv_pwconv"),)
