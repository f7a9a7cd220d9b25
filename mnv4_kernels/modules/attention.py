"""Mobile attention: norm, multi-query attention with down-sampled keys and values, output projection."""

from __future__ import annotations

from typing import Any

import torch

from .blocks import drop_path_of, has_skip, skip_drop_steps
from .body import Body
from .dropin import BlockForward, DropIn
from .multi_query import attention_steps
from .steps import Own

_SETTINGS = ("num_heads", "key_dim", "scale", "fused_attn", "has_query_strides", "einsum")


class MultiQueryAttention2dForward(DropIn):
    """Drop-in forward of timm's MultiQueryAttention2d."""

    def _mnv4_body(self, key: str) -> Body:
        return Body(self, attention_steps("attention", self), settings=[(self, _SETTINGS)])

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, H, W]; a mask takes timm's own path."""
        y = self._mnv4_run(x) if attn_mask is None else None
        return super().forward(x, attn_mask) if y is None else y


class MobileAttentionForward(BlockForward):
    """Drop-in forward of timm's MobileAttention."""

    def _mnv4_body(self, key: str) -> Body:
        modules: dict[str, Any] = dict(self._modules)
        cpe = modules.get("conv_cpe_dw")
        if cpe is not None:
            reason = "a conditional position encoding before the skip"
            return Body(self, [Own(name, module, reason) for name, module in modules.items()], bypassed=[])
        steps = [
            *attention_steps("attention", modules["attn"], modules["norm"], modules.get("layer_scale")),
            *skip_drop_steps(self),
        ]
        settings = [(self, ("has_skip",)), (modules["attn"], _SETTINGS)]
        if any(isinstance(step, Own) and step.name == "attn" for step in steps):
            settings = settings[:1]
        return Body(self, steps, residual=has_skip(self), drop_path=drop_path_of(self), settings=settings)
