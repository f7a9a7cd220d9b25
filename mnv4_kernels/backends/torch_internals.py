"""All of torch that no version promises to the next: private names, and what torch.compile is told and asked.

No other file names them, but for inductor's in `compiler` and `benchmark`. What is otherwise in another version of
torch is mended here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch._prims_common
import torch.utils._python_dispatch

#: the version's first two numbers
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

DispatchKey = torch._C.DispatchKey
DispatchKeySet = torch._C.DispatchKeySet
KEYS_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
below_autograd = torch._C._AutoDispatchBelowAutograd
without_key = torch._C._ExcludeDispatchKeyGuard
any_requires_grad = torch._C._any_requires_grad
#: an autograd node that raises in its backward
DelayedError = torch._C._functions.DelayedError
foreach_add_ = torch._foreach_add_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
#: not None while torch.jit traces
jit_tracing_state = torch._C._get_tracing_state
OpOverload = torch._ops.OpOverload
#: what Dynamo writes into a graph for torch.nn.functional.pad
pad_in_graphs = torch._C._nn.pad
#: torch's rule for convolutions: strides decide, also where sizes of one make both formats true
suggest_memory_format = torch._prims_common.suggest_memory_format
TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Marks `function` as one whose answer a compiled graph reads once, when it is made, and keeps."""
    # what torch.compiler.assume_constant_result does, which would import all of torch._dynamo, and Triton with it
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def forward_mode() -> bool:
    """True in `torch.func.jvp` or a dual level: ops have no forward-mode derivative, PyTorch takes it for zero."""
    return torch.autograd.forward_ad._current_level >= 0


@constant_in_graphs
def transformed() -> bool:
    """True inside a transform of torch.func, and in forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_mode()


@constant_in_graphs
def exporting_onnx() -> bool:
    """True while torch.onnx.export asks for a graph."""
    onnx: Any = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def opaque_to_graphs(function: Function) -> Function:
    """Marks `function` as one that torch.compile calls and does not look into."""
    # what torch.compiler.disable does, which would import all of torch._dynamo
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def edited_in_graph(tensors: Iterable[torch.Tensor], holders: Iterable[object]) -> bool:
    """True if the graph that torch.compile is making writes to one of `tensors`, or to one of the `holders`.

    Dynamo only notes such writes: they take place when the graph runs, and an op that looks
    at the tensor itself would not see them.

    Args:
        tensors: as they are outside the graph.
        holders: modules and their dicts of tensors, where others may be put in their place.
    """
    symbolic_convert: Any = sys.modules.get("torch._dynamo.symbolic_convert")
    output = symbolic_convert.InstructionTranslator.current_tx().output
    effects = output.side_effects
    for holder in holders:
        variable = effects.id_to_variable.get(id(holder))
        if variable is not None and effects.is_modified(variable):
            return True
    # fakes begin with version 0, whatever the tensor's own is
    written = [arg for arg in output.graphargs if arg.fake_tensor is not None and arg.fake_tensor._version]
    if not written:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return any(arg.example.untyped_storage()._cdata in storages for arg in written)


def untraced() -> AbstractContextManager[Any]:
    """Within it tensors are real, and nothing that is done to them enters a graph that is being traced."""
    context: AbstractContextManager[Any] = torch.utils._python_dispatch._disable_current_modes()
    return context
