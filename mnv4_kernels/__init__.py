"""Fused kernels for timm's MobileNet-V4.

    import mnv4_kernels as mk

    report = mk.patch(model)    # in place; print(report) says what was replaced, what was not and why
    mk.verify(model, x)         # raises unless every block is as exact as timm's
    mk.unpatch(model)
    fast = mk.optimize(model)   # a new module, for inference: the whole network planned at once

Importing this package registers the ops (`torch.ops.mnv4_kernels`) and changes nothing
else. timm and Triton are imported by what needs them, when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import environment, functional, ops

if TYPE_CHECKING:
    from .engine import OptimizedNetwork, OptimizeError
    from .engine.optimize import optimize
    from .modules import refresh
    from .patching import (
        PatchError,
        PatchReport,
        VerificationError,
        explain,
        patch,
        patch_timm,
        patched,
        unpatch,
        unpatch_timm,
        verify,
    )

__version__ = "0.1.0"

#: public name -> the module that has it, imported at the first use
_LAZY = {
    **dict.fromkeys(
        (
            "PatchError",
            "PatchReport",
            "VerificationError",
            "explain",
            "patch",
            "patch_timm",
            "patched",
            "unpatch",
            "unpatch_timm",
            "verify",
        ),
        ".patching",
    ),
    **dict.fromkeys(("OptimizeError", "OptimizedNetwork", "optimize"), ".engine"),
    "refresh": ".modules",
}

__all__ = [
    "OptimizeError",
    "OptimizedNetwork",
    "PatchError",
    "PatchReport",
    "VerificationError",
    "environment",
    "explain",
    "functional",
    "ops",
    "optimize",
    "patch",
    "patch_timm",
    "patched",
    "refresh",
    "unpatch",
    "unpatch_timm",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
