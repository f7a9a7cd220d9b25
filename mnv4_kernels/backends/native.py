"""The C++ library: found, loaded once, and where it is not, the reasons.

Nothing here raises at import. `load` is called when `mnv4_kernels.ops` is imported;
the ops answer through their references where it had nothing to load.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

from .torch_internals import VERSION, constant_in_graphs

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "lib" / "libmnv4_kernels_ops.so"

#: The torch whose stable ABI the library is built for.
MINIMUM_TORCH = (2, 11)


def load() -> bool:
    """Loads the library, registering its ops, unless that was tried before; True if it is there."""
    return _loaded()[0] is not None


@constant_in_graphs
def available() -> bool:
    """True if the C++ ops are registered."""
    return load()


def reasons() -> list[str]:
    """Why the library is not available, in sentences; empty if it is."""
    return list(_loaded()[1])


def module() -> ModuleType:
    """`mnv4_kernels._C`; raises `RuntimeError` with the reasons where it is not available."""
    found, why_not = _loaded()
    if found is None:
        raise RuntimeError(f"the C++ library of mnv4_kernels is not available: {'; '.join(why_not)}")
    return found


@functools.cache
def _loaded() -> tuple[ModuleType | None, tuple[str, ...]]:
    if VERSION < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        return None, (f"torch {torch.__version__} is older than {minimum}, whose stable ABI the library needs",)
    if not LIBRARY.exists():
        return None, (_why_missing(),)
    try:
        # `_C` first: it pulls the ops library in, so that either both are there or neither is
        found = importlib.import_module("mnv4_kernels._C")
        torch.ops.load_library(str(LIBRARY))
    except (ImportError, OSError, RuntimeError) as error:
        return None, (f"{LIBRARY.name} does not load in torch {torch.__version__}: {error}",)
    return found, ()


def _why_missing() -> str:
    if (PACKAGE.parent / "setup.py").exists():
        return (
            f"this is a source checkout ({PACKAGE.parent}) without a built library; "
            "`python setup.py build_ext --inplace` builds it here, an installed copy is seen from other folders"
        )
    return "the package was installed without it; `pip install .` builds it on Linux with a C++20 compiler"
