"""The ops of `torch.ops.mnv4_kernels`: contracts, references, and what can run where."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ..backends import cuda, native
from ._contract import DIRECT, LIBRARY, REFERENCES
from .bn_act import bn_act
from .bn_act_conv import bn_act_conv
from .bn_act_dwconv import bn_act_dwconv
from .bn_act_pwconv import bn_act_pwconv
from .conv_bn_act import conv_bn_act
from .conv_pwconv import conv_pwconv
from .dwconv_bn_act import dwconv_bn_act
from .dwconv_pwconv import dwconv_pwconv
from .head import head
from .kv_downsample import kv_downsample
from .mobile_attention import mobile_attention
from .mqa import mqa
from .mqa_projected import mqa_projected
from .prepack import prepack
from .pwconv_bn_act import pwconv_bn_act
from .uib import uib


@functools.cache
def _by_engine(op: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(f".{op}.engine_{op}", __package__), op)
    return found


__all__ = [
    "DIRECT",
    "bn_act",
    "bn_act_conv",
    "bn_act_dwconv",
    "bn_act_pwconv",
    "conv_bn_act",
    "conv_pwconv",
    "dwconv_bn_act",
    "dwconv_pwconv",
    "head",
    "kv_downsample",
    "mobile_attention",
    "mqa",
    "mqa_projected",
    "prepack",
    "pwconv_bn_act",
    "uib",
]

# the library registers the CPU kernels of the schemas above; where it is missing the references answer
if native.available():
    # whole blocks are programs of the engine, which Python writes: imported with the first call
    for _block in ("mobile_attention", "uib"):
        LIBRARY.impl(_block, lambda *arguments, op=_block: _by_engine(op)(*arguments), "CPU")

# for CUDA tensors only, and without importing Triton: the first call of a kernel does
cuda.register(LIBRARY, REFERENCES)
