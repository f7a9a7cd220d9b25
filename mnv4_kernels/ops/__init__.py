"""The ops of `torch.ops.mnv4_kernels`: contracts, references, and what can run where."""

from ..backends import native
from .conv_bn_act import conv_bn_act
from .dwconv_bn_act import dwconv_bn_act
from .head import head
from .kv_downsample import kv_downsample
from .mqa import mqa
from .prepack import prepack
from .pwconv_bn_act import pwconv_bn_act

__all__ = ["conv_bn_act", "dwconv_bn_act", "head", "kv_downsample", "mqa", "prepack", "pwconv_bn_act"]

# the library registers the CPU kernels of the schemas above; where it is missing the references answer
native.available()
