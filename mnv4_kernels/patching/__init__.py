"""Patching of timm's models: rules, reports, verification."""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"patching needs timm, which does not import here ({error}); `pip install timm` gets it"
    ) from error

from .explanation import ExplainReport, Explanation, explain
from .factory import patch_timm, unpatch_timm
from .instances import PatchError, patch, patched, unpatch
from .report import PatchReport, Row
from .verification import VerificationError, VerifyReport, verify

__all__ = [
    "ExplainReport",
    "Explanation",
    "PatchError",
    "PatchReport",
    "Row",
    "VerificationError",
    "VerifyReport",
    "explain",
    "patch",
    "patch_timm",
    "patched",
    "unpatch",
    "unpatch_timm",
    "verify",
]
