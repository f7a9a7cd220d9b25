"""Drop-in forwards: what timm's blocks compute, through the fused ops. Knows nn.Module, not timm."""

from . import leaves
from .attention import MobileAttentionForward, MultiQueryAttention2dForward
from .blocks import ConvBnActForward, ConvNormActForward, EdgeResidualForward, UniversalInvertedResidualForward
from .body import Body
from .dropin import DropIn, leave_room, make_room, refresh
from .network import HEAD, PRE_LOGITS, STEM, MobileNetV3FeaturesForward, MobileNetV3Forward, timm_stem
from .plan import Plan
from .steps import Own
from .training import TrainingPlan

__all__ = [
    "HEAD",
    "PRE_LOGITS",
    "STEM",
    "Body",
    "ConvBnActForward",
    "ConvNormActForward",
    "DropIn",
    "EdgeResidualForward",
    "MobileAttentionForward",
    "MobileNetV3FeaturesForward",
    "MobileNetV3Forward",
    "MultiQueryAttention2dForward",
    "Own",
    "Plan",
    "TrainingPlan",
    "UniversalInvertedResidualForward",
    "leave_room",
    "leaves",
    "make_room",
    "refresh",
    "timm_stem",
]
