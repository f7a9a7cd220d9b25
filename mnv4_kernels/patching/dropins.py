"""The drop-in classes: timm's, with another forward. No other module imports timm's classes.

They are ordinary module-level classes, so that a patched model pickles. Importing this
module teaches `modules.leaves` timm's leaf classes, which unpickling needs as well.
"""

from __future__ import annotations

from timm.layers import (
    BatchNormAct2d,
    ConvNormAct,
    DropPath,
    FrozenBatchNormAct2d,
    LayerScale2d,
    Linear,
    SelectAdaptivePool2d,
)
from timm.layers.activations import GELU, GELUTanh
from timm.layers.attention2d import MultiQueryAttention2d
from timm.layers.blur_pool import BlurPool2d
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual, MobileAttention, UniversalInvertedResidual
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from torch import nn

from ..modules import (
    ConvBnActForward,
    ConvNormActForward,
    EdgeResidualForward,
    MobileAttentionForward,
    MobileNetV3FeaturesForward,
    MobileNetV3Forward,
    MultiQueryAttention2dForward,
    UniversalInvertedResidualForward,
    leaves,
)


class FusedConvNormAct(ConvNormActForward, ConvNormAct):
    """timm's ConvNormAct on the fused ops."""

    _mnv4_base = ConvNormAct


class FusedConvBnAct(ConvBnActForward, ConvBnAct):
    """timm's ConvBnAct (the `cn` block) on the fused ops."""

    _mnv4_base = ConvBnAct


class FusedEdgeResidual(EdgeResidualForward, EdgeResidual):
    """timm's EdgeResidual on the fused ops."""

    _mnv4_base = EdgeResidual


class FusedUniversalInvertedResidual(UniversalInvertedResidualForward, UniversalInvertedResidual):
    """timm's UniversalInvertedResidual on the fused ops."""

    _mnv4_base = UniversalInvertedResidual


class FusedMultiQueryAttention2d(MultiQueryAttention2dForward, MultiQueryAttention2d):
    """timm's MultiQueryAttention2d on the fused ops."""

    _mnv4_base = MultiQueryAttention2d


class FusedMobileAttention(MobileAttentionForward, MobileAttention):
    """timm's MobileAttention on the fused ops."""

    _mnv4_base = MobileAttention


class FusedMobileNetV3(MobileNetV3Forward, MobileNetV3):
    """timm's MobileNetV3 (MobileNet-V4's network class) on the fused ops."""

    _mnv4_base = MobileNetV3


class FusedMobileNetV3Features(MobileNetV3FeaturesForward, MobileNetV3Features):
    """timm's MobileNetV3Features on the fused ops."""

    _mnv4_base = MobileNetV3Features


def _pool_reason(pool: SelectAdaptivePool2d) -> str:
    plain = pool.pool_type == "avg" and type(pool.pool) is nn.AdaptiveAvgPool2d and pool.pool.output_size in (1, (1, 1))
    if not plain:
        return f"global pool {pool.pool_type or 'none'!r}"
    return "" if type(pool.flatten) is nn.Identity else "the global pool flattens"


leaves.CONVS[Conv2dSame] = True
leaves.FROZEN_NORMS.add(FrozenBatchNormAct2d)
leaves.NORMS.update((BatchNormAct2d, *leaves.FROZEN_NORMS))
leaves.ACTS[GELU] = lambda act: "gelu"
leaves.ACTS[GELUTanh] = lambda act: "gelu_tanh"
leaves.LAYER_SCALES.add(LayerScale2d)
leaves.BLUR_POOLS.add(BlurPool2d)
leaves.POOLS[SelectAdaptivePool2d] = _pool_reason
leaves.LINEARS.add(Linear)
leaves.DROPS.add(DropPath)
leaves.CONV_NORM_ACTS.update((ConvNormAct, FusedConvNormAct))
leaves.ATTENTIONS.update((MultiQueryAttention2d, FusedMultiQueryAttention2d))
