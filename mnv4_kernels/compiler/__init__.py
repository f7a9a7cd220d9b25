"""For torch.compile: the backend "mnv4_kernels", and the pass that it gives to inductor.

    torch.compile(model, backend="mnv4_kernels")

needs no import: PyTorch finds the backend through the package's metadata. `FuseConvolutions` is the pass alone, for
`torch._inductor.config.pre_grad_custom_pass`.
"""

from .backend import backend
from .fuse import FuseConvolutions

__all__ = ["FuseConvolutions", "backend"]
