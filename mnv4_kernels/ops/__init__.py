"""The ops of `torch.ops.mnv4_kernels`: contracts, references, and what can run where."""

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
from .mqa import mqa
from .mqa_projected import mqa_projected
from .prepack import prepack
from .pwconv_bn_act import pwconv_bn_act
from .uib import uib

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
    "mqa",
    "mqa_projected",
    "prepack",
    "pwconv_bn_act",
    "uib",
]

# the library registers the CPU kernels of the schemas above; where it is missing the references answer
native.available()

# for CUDA tensors only, and without importing Triton: the first call of a kernel does
cuda.register(LIBRARY, REFERENCES)
