"""Pieces in graphs of torch.export: pure functions of the parameters, which an exported program owns.

An exported program must run without this process's modules, in C++ too, and follow its
own state_dict. So the folding and packing of the parameters is part of the graph; whoever
compiles the graph with constant parameters (`freezing`) has it done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..backends.torch_internals import constant_in_graphs
from ..environment import Switches
from . import leaves
from .body import Body, dtype_of
from .plan import in_order
from .watch import obstacle_of


def export_piece(module: Any, key: str, x: torch.Tensor) -> torch.Tensor | None:
    """The piece `key` of a drop-in on `x` by ops on arguments folded in the graph; None: timm's own path must run."""
    if _obstacle(module, key, x.dtype):
        return None
    body: Body = module._mnv4_body(key)
    # a whole network is a program; `Whole` can't be imported below the drop-ins
    program: Callable[[torch.Tensor], torch.Tensor | None] | None = getattr(body.fused[0], "traced", None)
    return in_order(body)(x) if program is None else program(x)


# for strict export, which would trace what here is asked of modules and of the environment
@constant_in_graphs
def _obstacle(module: Any, key: str, dtype: torch.dtype) -> str:
    body: Body = module._mnv4_body(key)
    if not body.fused:
        return "nothing that an op computes"
    if dtype_of(body.fused) is not dtype:
        return "the input's dtype is not that of the parameters"
    tensors = [tensor for step in body.fused for tensor in step.tensors() if tensor is not None]
    if any(tensor.dtype not in leaves.DTYPES or not tensor.is_cpu for tensor in tensors):
        return "parameters that the ops don't take"
    switches = Switches(op for step in body.fused for op in step.ops)
    return switches.obstacle() or obstacle_of(body.bypassed)
