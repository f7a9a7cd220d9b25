"""Drop-in forwards of timm's MobileNetV3, the network class of MobileNet-V4.

The stem reads the image as it comes and writes NHWC, the blocks keep it, the head reads
it: no conversions inside. What leaves the network before the head is handed out in the
memory format in which timm would hand it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..backends.torch_internals import suggest_memory_format
from . import leaves
from .body import Body
from .dropin import DropIn
from .head import head_steps
from .section import Section, sections
from .steps import Own, Step, convolution
from .training import Pending, written
from .whole import Whole

STEM = "stem"
HEAD = "head"
PRE_LOGITS = "pre_logits"
EXPAND = "conv_head"
WHOLE = "whole"


def stem_body(network: nn.Module) -> Body:
    """`conv_stem`, `bn1` and, in feature extractors, `act1`."""
    modules: dict[str, Any] = dict(network._modules)
    conv, norm, act = modules["conv_stem"], modules["bn1"], modules.get("act1")
    steps = convolution(STEM, conv, norm, act, channels_last=True)
    return Body(network, steps, bypassed=_with_children(conv, norm, act))


def timm_stem(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The stem's result by timm's modules."""
    modules: dict[str, Any] = dict(network._modules)
    y = modules["bn1"](modules["conv_stem"](x))
    return modules["act1"](y) if "act1" in modules else y


def head_body(network: nn.Module, classifier: bool) -> Body:
    """Pool, `conv_head`, `norm_head`, `act2`, flatten, and the classifier or not."""
    modules: dict[str, Any] = dict(network._modules)
    expand = convolution("conv_head", modules["conv_head"], _not_idle(modules["norm_head"]), _not_idle(modules["act2"]))
    last = modules["classifier"] if classifier else None
    steps = head_steps(modules["global_pool"], expand, modules["flatten"], last)
    names = ["global_pool", "conv_head", "norm_head", "act2", "flatten", *(["classifier"] if classifier else [])]
    settings = [(modules["global_pool"], ["pool_type"])] if hasattr(modules["global_pool"], "pool_type") else []
    return Body(network, steps, bypassed=_with_children(*(modules[name] for name in names)), settings=settings)


def expand_body(network: nn.Module) -> Body:
    """`conv_head`, `norm_head` and `act2`: what of the head an op computes in train mode."""
    modules: dict[str, Any] = dict(network._modules)
    conv, norm, act = (modules[name] for name in ("conv_head", "norm_head", "act2"))
    steps = convolution(EXPAND, conv, _not_idle(norm), _not_idle(act))
    return Body(network, steps, bypassed=_with_children(conv, norm, act))


def whole_body(network: nn.Module) -> Body:
    """Stem, blocks and head, if ops or, between them, the engine's pools compute all of them; else nothing."""
    stem, head = stem_body(network), head_body(network, classifier=True)
    inner: Any = sections("blocks", network._modules["blocks"])  # type: ignore[arg-type]
    steps: list[Step] = [*stem.steps, *inner, *head.steps]
    own = [step for step in steps if isinstance(step, Own)]
    whole = [Whole("network", tuple(step for step in steps if not isinstance(step, Own)))]
    bodies = [stem, head, *(step.body for step in inner if isinstance(step, Section))]
    settings = [setting for body in bodies for setting in body.settings]
    bypassed = [module for module in network.modules() if module is not network]
    return Body(network, own or whole, bypassed=bypassed, settings=settings)


class _Network(DropIn):
    """What the network classes share: the stem."""

    _mnv4_eval_only = frozenset((HEAD, PRE_LOGITS, WHOLE))

    def _mnv4_by_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """The forward as stem, blocks and head, each on its own."""
        raise NotImplementedError

    def _mnv4_stem(self, x: torch.Tensor) -> torch.Tensor:
        """The stem's result in NHWC, by the op or by timm's modules."""
        y = self._mnv4_run(x, STEM)
        if y is not None:
            return y
        return timm_stem(self, x).contiguous(memory_format=torch.channels_last)

    def _mnv4_otherwise(self, x: torch.Tensor, key: str) -> torch.Tensor:
        if key == STEM:
            return timm_stem(self, x).contiguous(memory_format=torch.channels_last)
        timm: Any = self._mnv4_base
        if key in (HEAD, PRE_LOGITS):
            y: torch.Tensor = timm.forward_head(self, x, key == PRE_LOGITS)
        elif self._mnv4_whole(x):
            y = self._mnv4_by_pieces(x)
        else:
            y = timm.forward(self, x)
        return y

    def _mnv4_whole(self, x: Any) -> bool:
        """True where the forwards here may run: a plain tensor, and timm's methods where they were."""
        own = self.__dict__
        replaced = "forward_features" in own or "forward_head" in own
        return not replaced and not self._mnv4_obstacle(x) and not self.grad_checkpointing

    def _mnv4_like_timm(self, y: torch.Tensor, x: torch.Tensor, stages: int) -> torch.Tensor:
        """`y`, the map after so many stages, in the memory format in which timm hands it out for the input `x`."""
        conv: Any = self._modules["conv_stem"]
        nhwc = _is_nhwc(conv.weight) or (_is_nhwc(x) and not self._mnv4_attends(stages))
        return y.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    @property
    def _mnv4_stages(self) -> int:
        blocks: Any = self._modules["blocks"]
        return len(blocks)

    def _mnv4_attends(self, stages: int) -> bool:
        """True if there is attention before: timm's ends in NCHW unless its weights are NHWC."""
        blocks: Any = self._modules["blocks"]
        return any(type(module) in leaves.ATTENTIONS for stage in blocks[:stages] for module in stage.modules())


class MobileNetV3Forward(_Network):
    """Drop-in forwards of MobileNetV3: the classifier, and the trunk with its taps."""

    def _mnv4_body(self, key: str) -> Body:
        if key == STEM:
            return stem_body(self)
        if key in (HEAD, PRE_LOGITS):
            return head_body(self, classifier=key == HEAD)
        if key == EXPAND:
            return expand_body(self)
        return whole_body(self)

    def _mnv4_features(self, x: torch.Tensor) -> torch.Tensor:
        blocks: Any = self._modules["blocks"]
        if not self.training:
            return blocks(self._mnv4_stem(x))
        plan = self._mnv4_trainer(x, STEM)
        if plan is not None:
            return written(train_through(blocks, plan.advance(Pending(x))))
        return written(train_through(blocks, Pending(self._mnv4_stem(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] -> logits [N, K]."""
        if not self._mnv4_whole(x):
            return super().forward(x)
        # with gradients, recomputing block by block needs less memory than the network at once
        y = None if self.training or torch.is_grad_enabled() else self._mnv4_run(x, WHOLE)
        if y is not None:
            return y
        return self._mnv4_by_pieces(x)

    def _mnv4_program_obstacle(self, x: Any) -> str:
        """Why `forward` takes `x`, on a CPU and in eval mode, through piece by piece; empty: it is one program.

        Only where no inner module has a hook that is not the user's.
        """
        if not self._mnv4_whole(x):
            return self._mnv4_obstacle(x) or "gradient checkpointing, or a method that was replaced on the instance"
        if torch.is_grad_enabled():
            return "gradients are enabled; torch.inference_mode() or torch.no_grad() turns them off"
        plan, obstacle = self._mnv4_decide(x, WHOLE)
        if obstacle or plan is None:
            return obstacle
        (whole,) = plan.body.fused
        assert isinstance(whole, Whole)
        return "" if whole.has_program() else "the engine is missing, or has no node for one of the pieces"

    def _mnv4_by_pieces(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.forward_head(self._mnv4_features(x))
        # a head without pooling gives a map
        return self._mnv4_like_timm(y, x, self._mnv4_stages) if y.dim() == 4 else y

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W] -> the last stage's map."""
        if not self._mnv4_whole(x):
            timm: Any = super()
            return timm.forward_features(x)
        return self._mnv4_like_timm(self._mnv4_features(x), x, self._mnv4_stages)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last stage's map -> logits [N, K], or the features before the classifier."""
        y = self._mnv4_train_head(x, pre_logits) if self.training else None
        if y is None:
            y = self._mnv4_run(x, PRE_LOGITS if pre_logits else HEAD)
        timm: Any = super()
        return timm.forward_head(x, pre_logits) if y is None else y

    def _mnv4_train_head(self, x: torch.Tensor, pre_logits: bool) -> torch.Tensor | None:
        """timm's head with the op for its convolution; None where that may not run."""
        plan = self._mnv4_trainer(x, EXPAND)
        if plan is None:
            return None
        modules: dict[str, Any] = dict(self._modules)
        y: torch.Tensor = modules["flatten"](plan.run(modules["global_pool"](x)))
        rate: Any = self.drop_rate
        if rate > 0.0:
            y = F.dropout(y, p=rate, training=True)
        return y if pre_logits else modules["classifier"](y)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        *args: Any,
        stop_early: bool = False,
        intermediates_only: bool = False,
        extra_blocks: bool = False,
        **kwargs: Any,
    ) -> Any:
        """timm's `forward_intermediates`: images -> (last map, taps), or the taps."""
        blocks: Any = self._modules["blocks"]
        ends: Any = range(len(blocks) + 1) if extra_blocks else self.stage_ends
        taps = _chosen(ends, indices)
        # arguments by position, a wish for another format or a wrong index: timm's to understand or to refuse
        usual = not args and set(kwargs) <= {"norm", "output_fmt"} and kwargs.get("output_fmt", "NCHW") == "NCHW"
        if not usual or taps is None or (stop_early and not intermediates_only) or not self._mnv4_whole(x):
            timm: Any = super()
            options = {"stop_early": stop_early, "intermediates_only": intermediates_only}
            if extra_blocks:
                options["extra_blocks"] = True
            return timm.forward_intermediates(x, indices, *args, **options, **kwargs)
        y = self._mnv4_stem(x)
        found = [self._mnv4_like_timm(y, x, 0)] if 0 in taps else []
        last = max(taps) if stop_early else len(blocks)
        for stage, block in enumerate(blocks[:last], start=1):
            y = block(y)
            if stage in taps:
                found.append(self._mnv4_like_timm(y, x, stage))
        return found if intermediates_only else (self._mnv4_like_timm(y, x, last), found)


class MobileNetV3FeaturesForward(_Network):
    """Drop-in forward of MobileNetV3Features, what `features_only=True` gives."""

    def _mnv4_body(self, key: str) -> Body:
        return stem_body(self)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, C, H, W] -> one map for each tap."""
        # taps inside blocks are taken by hooks, which keep those blocks on timm's path
        if not self._mnv4_whole(x) or self.feature_hooks is not None:
            return super().forward(x)
        y = self._mnv4_stem(x)
        blocks: Any = self._modules["blocks"]
        taps: Any = self._stage_out_idx
        found = [self._mnv4_like_timm(y, x, 0)] if 0 in taps else []
        for stage, block in enumerate(blocks, start=1):
            y = block(y)
            if stage in taps:
                found.append(self._mnv4_like_timm(y, x, stage))
        return found


def train_through(module: nn.Module, state: Pending) -> Pending:
    """`module` applied to what may be pending: drop-ins in Sequentials pass it on, anything else gets the map."""
    hooked = any(map(bool, _hooks_of(module)))
    if not hooked and type(module) is nn.Sequential and not leaves.tampered(module):
        # not `children()`, which gives a block that is used twice once
        for child in module:
            state = train_through(child, state)
        return state
    if not hooked and isinstance(module, DropIn) and module.training and not leaves.tampered(module):
        plan = module._mnv4_trainer(state.x)
        if plan is not None:
            return plan.advance(state)
    return Pending(module(written(state)))


def _hooks_of(module: nn.Module) -> list[Any]:
    state = vars(module)
    return [state[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre")]


def _with_children(*modules: nn.Module | None) -> list[nn.Module]:
    return [child for module in modules if module is not None for child in module.modules()]


def _not_idle(module: nn.Module) -> nn.Module | None:
    return None if type(module) is nn.Identity else module


def _chosen(ends: Sequence[int], indices: int | Sequence[int] | None) -> list[int] | None:
    """The stages that are tapped, of those where maps end; None for an index that there is not."""
    if indices is None:
        return list(ends)
    count = len(ends)
    if isinstance(indices, int):
        return list(ends[count - indices :]) if 0 < indices <= count else None
    return [ends[index] for index in indices] if all(-count <= index < count for index in indices) else None


def _is_nhwc(x: torch.Tensor) -> bool:
    return suggest_memory_format(x) is torch.channels_last
