"""Which leaf modules the ops can stand in for, and why not the others.

The tables hold torch's own classes; `patching.dropins` adds timm's. A class is looked up
exactly, never by isinstance: a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..ops import layout
from ..ops.support import CPP_DTYPES, dtype_name

#: convolution class -> True where it pads as TensorFlow's 'same' does, by the input's size
CONVS: dict[type[nn.Module], bool] = {nn.Conv2d: False}

#: normalisation classes that are BatchNorm2d, perhaps with `drop` and `act` submodules
NORMS: set[type[nn.Module]] = {nn.BatchNorm2d}

#: those of `NORMS` that use their running statistics in train mode, too, and never change them
FROZEN_NORMS: set[type[nn.Module]] = set()

#: activation class -> the ops' name for it
ACTS: dict[type[nn.Module], Callable[[Any], str]] = {
    nn.Identity: lambda act: "none",
    nn.ReLU: lambda act: "relu",
    nn.ReLU6: lambda act: "relu6",
    nn.Hardswish: lambda act: "hard_swish",
    nn.SiLU: lambda act: "silu",
    nn.GELU: lambda act: "gelu_tanh" if act.approximate == "tanh" else "gelu",
}

#: classes of layer scales: y = x * gamma
LAYER_SCALES: set[type[nn.Module]] = set()

#: anti-aliasing by a fixed depthwise filter, which the engine has a node for
BLUR_POOLS: set[type[nn.Module]] = set()

#: global pool class -> why an instance is no plain global average, empty: it is
POOLS: dict[type[nn.Module], Callable[[Any], str]] = {}

#: fully connected layers
LINEARS: set[type[nn.Module]] = {nn.Linear}

#: modules that do nothing in eval mode
DROPS: set[type[nn.Module]] = {nn.Identity, nn.Dropout}

#: convolution + norm + activation blocks with `conv`, `bn` and `aa`
CONV_NORM_ACTS: set[type[nn.Module]] = set()

#: multi-query attention
ATTENTIONS: set[type[nn.Module]] = set()

#: what the fused ops compute in
DTYPES = CPP_DTYPES

#: where the fused ops run
DEVICES = frozenset(("cpu", "cuda"))


def on_gpu(tensor: torch.Tensor) -> bool:
    """True for tensors that the Triton kernels serve."""
    return tensor.is_cuda


def tampered(module: nn.Module) -> str:
    """Why `module`'s class doesn't tell what it computes; empty: it does."""
    return "its `forward` was replaced on the instance" if "forward" in vars(module) else ""


def tensor_reasons(module: nn.Module) -> list[str]:
    """Why `module`'s own parameters and buffers can't be read as plain, versioned tensors."""
    reasons = []
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is None or name == "num_batches_tracked":
            continue
        if type(value) not in (torch.Tensor, nn.Parameter):
            reasons.append(f"`{name}` is a {type(value).__name__}, not a plain tensor")
        elif value.is_inference():
            reasons.append(f"`{name}` was made under torch.inference_mode(), where edits leave no trace")
        elif value.numel() == 1:
            reasons.append(f"`{name}` has a single element")
        elif value.dtype not in DTYPES:
            reasons.append(f"`{name}` is {dtype_name(value.dtype)}")
        elif value.device.type not in DEVICES:
            reasons.append(f"`{name}` is on {value.device}; the fused ops run on cpu and cuda")
    return reasons


def conv_reasons(conv: nn.Module) -> list[str]:
    """Why `conv` is none of the ops' convolutions."""
    if type(conv) not in CONVS:
        return [f"{type(conv).__name__} is no Conv2d that the ops know"]
    assert isinstance(conv, nn.Conv2d)
    reasons = [reason for reason in (tampered(conv),) if reason]
    if conv.padding_mode != "zeros":
        reasons.append(f"padding mode {conv.padding_mode}")
    if conv.groups != 1 and not is_depthwise(conv):
        reasons.append(f"grouped convolution ({conv.groups} groups of {conv.in_channels // conv.groups} channels)")
    return reasons


def norm_reasons(norm: nn.Module | None) -> list[str]:
    """Why `norm` can't be folded; None (no normalisation) can."""
    if norm is None:
        return []
    if isinstance(norm, nn.SyncBatchNorm):
        return [f"the statistics of {type(norm).__name__} are of all processes: the ops have those of one"]
    if type(norm) not in NORMS:
        return [f"{type(norm).__name__} is not BatchNorm2d"]
    reasons = [reason for reason in (tampered(norm),) if reason]
    if norm.running_mean is None or norm.running_var is None:
        reasons.append(f"{type(norm).__name__} keeps no running statistics")
    drop = norm._modules.get("drop")
    if drop is not None and type(drop) is not nn.Identity:
        reasons.append(f"{type(drop).__name__} inside {type(norm).__name__}")
    return reasons


def uses_batch(norm: nn.Module) -> bool:
    """True where `norm`, one of `NORMS`, normalises by the batch's statistics and updates the running ones."""
    return norm.training and type(norm) not in FROZEN_NORMS


def act_reasons(act: nn.Module | None) -> list[str]:
    """Why `act` is none of the ops' activations; None (no activation) is."""
    if act is None:
        return []
    if type(act) not in ACTS:
        return [f"activation {type(act).__name__} is not one of the ops'"]
    return [reason for reason in (tampered(act),) if reason]


def pool_reasons(pool: nn.Module) -> list[str]:
    """Why `pool` is no global average."""
    if type(pool) not in POOLS:
        return [f"{type(pool).__name__} is no global average pool that the ops know"]
    return [reason for reason in (tampered(pool), POOLS[type(pool)](pool)) if reason]


def act_name(act: nn.Module | None) -> str:
    """The ops' name of an activation without `act_reasons`."""
    return "none" if act is None else ACTS[type(act)](act)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """True for a convolution of each channel on its own."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def is_pointwise(conv: nn.Conv2d) -> bool:
    """True for a 1x1 convolution that is a matrix product."""
    single = conv.kernel_size == (1, 1) and conv.stride == (1, 1)
    return single and conv.groups == 1 and conv.padding in ((0, 0), "valid")


def op_of(conv: nn.Conv2d) -> str:
    """The op that computes `conv`."""
    if is_depthwise(conv):
        return "dwconv_bn_act"
    return "pwconv_bn_act" if is_pointwise(conv) else "conv_bn_act"


def static_padding(conv: nn.Conv2d) -> list[int] | None:
    """[top, bottom, left, right]; None where it depends on the input's size (`same_padding`)."""
    if CONVS[type(conv)]:
        return None
    if conv.padding == "valid":
        return [0, 0, 0, 0]
    if conv.padding == "same":
        # torch's own 'same' (stride 1 only) puts the odd element at the bottom and right
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    assert not isinstance(conv.padding, str)
    height, width = conv.padding
    return [height, height, width, width]


def same_padding(conv: nn.Conv2d, height: int, width: int) -> list[int]:
    """[top, bottom, left, right] of TensorFlow's 'same' for an input of that size."""
    axes = zip((height, width), conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return [side for axis in axes for side in layout.same_padding(*axis)]


def padding_of(conv: nn.Conv2d, height: int, width: int) -> list[int]:
    """[top, bottom, left, right] for an input of that size."""
    return static_padding(conv) or same_padding(conv, height, width)


def output_size(conv: nn.Conv2d, height: int, width: int) -> tuple[int, ...]:
    """(height, width) of `conv`'s result; sizes may be symbols."""
    padding = static_padding(conv)
    stride = conv.stride
    if padding is None:
        return (-(-height // stride[0]), -(-width // stride[1]))
    sizes = zip((height, width), conv.kernel_size, stride, padding[::2], padding[1::2], conv.dilation, strict=True)
    return tuple(layout.conv_output_size(*arguments) for arguments in sizes)
