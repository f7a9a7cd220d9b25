"""The Triton kernels: registered for CUDA without importing Triton, loaded by the first call that needs one.

They are plain implementations of the ops' schemas (`define` / `impl`), not `triton_op`s: one contract serves
every device, and a compiled graph calls the op as eager does. What that costs against a decomposed
`triton_op` has to be measured on a device; it was not yet.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import environment
from .torch_internals import constant_in_graphs

#: op -> the module, below `mnv4_kernels.ops`, that implements it
KERNELS = {
    "bn_act": "bn_act.triton_bn_act",
    "bn_act_backward": "bn_act.triton_bn_act_backward",
    "bn_act_conv": "bn_act_conv.triton_bn_act_conv",
    "bn_act_conv_backward": "bn_act_conv.triton_bn_act_conv_backward",
    "bn_act_dwconv": "bn_act_dwconv.triton_bn_act_dwconv",
    "bn_act_dwconv_backward": "bn_act_dwconv.triton_bn_act_dwconv_backward",
    "bn_act_pwconv": "bn_act_pwconv.triton_bn_act_pwconv",
    "bn_act_pwconv_backward": "bn_act_pwconv.triton_bn_act_pwconv_backward",
    "conv_bn_act": "conv_bn_act.triton_conv_bn_act",
    "conv_pwconv": "conv_pwconv.triton_conv_pwconv",
    "dwconv_bn_act": "dwconv_bn_act.triton_dwconv_bn_act",
    "dwconv_pwconv": "dwconv_pwconv.triton_dwconv_pwconv",
    "head": "head.triton_head",
    "kv_downsample": "kv_downsample.triton_kv_downsample",
    "mqa": "mqa.triton_mqa",
    "mqa_backward": "mqa.triton_mqa_backward",
    "mqa_projected": "mqa_projected.triton_mqa_projected",
    "pwconv_bn_act": "pwconv_bn_act.triton_pwconv_bn_act",
    "uib": "uib.triton_uib",
}

#: what the kernels compute in; float64 keeps the references
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: tensor cores and the addressing that the kernels use start here
MINIMUM_CAPABILITY = (8, 0)

#: widest key, value or head of the attention kernels
MAX_DEPTH = {"kv_downsample": 256, "mqa": 128, "mqa_backward": 128, "mqa_projected": 128}

_OPS_PACKAGE = f"{__package__.rpartition('.')[0]}.ops"


@constant_in_graphs
def reasons() -> tuple[str, ...]:
    """Why no Triton kernel can run in this process, in sentences; empty if one can. Imports nothing."""
    # in two functions, since torch.compile warns of a cached one that it can see
    return found_reasons()


@functools.cache
def found_reasons() -> tuple[str, ...]:
    """The same, looked for."""
    found = []
    if importlib.util.find_spec("triton") is None:
        found.append("Triton is not installed")
    if not torch.cuda.is_available():
        found.append("there is no CUDA device")
    elif torch.cuda.get_device_capability() < MINIMUM_CAPABILITY:
        found.append("the CUDA device is older than compute capability 8.0")
    return tuple(found)


def unsupported(op: str, arguments: tuple[Any, ...]) -> list[str]:
    """Why the Triton kernel of `op` declines these arguments, in sentences; empty: it takes them."""
    x = arguments[0]
    found = []
    if x.dtype not in DTYPES:
        found.append(f"`{op}` has Triton kernels for float32, bfloat16 and float16, not for {x.dtype}")
    if op == "kv_downsample":
        widest = max(arguments[4].shape[0], arguments[8].shape[0])
        if (arguments[1] is None) != (arguments[5] is None):
            found.append("`kv_downsample` has a Triton kernel for two depthwise convolutions or none, not for one")
    elif op == "mqa":
        widest = max(arguments[1].shape[2], arguments[2].shape[2])
    elif op == "mqa_backward":
        widest = max(arguments[2].shape[2], arguments[3].shape[2])
    elif op == "mqa_projected":
        widest = max(arguments[4].shape[2], arguments[5].shape[2])
    else:
        return found
    if widest > MAX_DEPTH[op]:
        found.append(f"`{op}` has a Triton kernel for keys and values up to {MAX_DEPTH[op]} wide, not for {widest}")
    return found


def reasons_for(op: str, *arguments: Any) -> list[str]:
    """Why the Triton kernel of `op` does not answer this call: of the process, the device, the arguments."""
    found = list(reasons())
    if not arguments[0].is_cuda:
        found.append(f"the tensors are on {arguments[0].device}; the Triton kernels run on cuda")
    return found + unsupported(op, arguments)


@functools.cache
def kernel(op: str) -> Callable[..., Any]:
    """The Triton implementation of `op`; imports Triton."""
    implementation: Callable[..., Any] = getattr(importlib.import_module(f"{_OPS_PACKAGE}.{KERNELS[op]}"), op)
    return implementation


def decision(op: str, arguments: tuple[Any, ...]) -> str:
    """What the gate says of a call: the plan that it picks, and why not each other; empty for an op with one plan."""
    decide = getattr(importlib.import_module(f"{_OPS_PACKAGE}.{KERNELS[op]}"), "decide", None)
    found = None if decide is None else decide(*arguments)
    return "" if found is None else str(found.explain())


def implementation(op: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls for CUDA tensors: the kernel, or the reference where it declines or is turned off."""
    # one switch for both directions
    switches = environment.Switches([op.removesuffix("_backward")])

    def run(*arguments: Any) -> Any:
        if reasons() or switches.obstacle() or unsupported(op, arguments):
            return reference(*arguments)
        return kernel(op)(*(_dense(value) for value in arguments))

    return run


def _dense(value: Any) -> Any:
    """A vector as kernels read it; autograd hands out expanded ones, such as the gradient of a sum."""
    strided = isinstance(value, torch.Tensor) and value.dim() == 1 and not value.is_contiguous()
    return value.contiguous() if strided else value


def register(library: torch.library.Library, references: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Registers every Triton kernel whose op is in `references` for CUDA; returns the names of those ops.

    Without Triton nothing is registered, and the references answer.
    """
    if importlib.util.find_spec("triton") is None:
        return []
    names = [op for op in KERNELS if op in references]
    for op in names:
        library.impl(op, implementation(op, references[op]), "CUDA")
    return names
