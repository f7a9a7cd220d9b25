"""A block's train-mode forward: the same steps as in eval mode, each by its training op, with live parameters.

Between two convolutions no normalised tensor exists: what passes is a `Pending`, the raw
result of one convolution and the BatchNorm and activation that the next op applies while
it reads. Autograd knows each op, so that everything around it (checkpointing, hooks of
parameters, process groups, optimizers) works as with torch's own modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..backends import native
from ..backends.torch_internals import foreach_add_, foreach_lerp_, foreach_mul
from ..environment import Switches
from ..ops import DIRECT
from ..ops.support import dtype_name
from . import gpu, leaves
from .body import Body
from .multi_query import MultiQuery
from .steps import Convolution, Fused, Own, Step
from .watch import HOOKED, Watch

#: mean, variance, weight, bias, eps, activation of what nothing is pending on
_NOTHING: tuple[Any, ...] = (None, None, None, None, 0.0, "none")


class Pending(NamedTuple):
    """A map whose normalisation, activation and layer scale the next op applies."""

    x: torch.Tensor
    norm: tuple[Any, ...] = _NOTHING
    layer_scale: torch.Tensor | None = None

    @property
    def is_map(self) -> bool:
        """True where nothing is pending."""
        mean, *_, act = self.norm
        return mean is None and act == "none" and self.layer_scale is None


@dataclasses.dataclass
class _Statistics:
    """Batch statistics of one forward, written to the running ones together: a few calls for a block."""

    norms: list[Any] = dataclasses.field(default_factory=list)
    means: list[torch.Tensor] = dataclasses.field(default_factory=list)
    variances: list[torch.Tensor] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)

    def add(self, norm: Any, mean: torch.Tensor, variance: torch.Tensor, x: torch.Tensor) -> None:
        """Notes the moments of `x` [N, C, H, W], which `norm` uses."""
        count = x.numel() // max(1, x.shape[1])
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        self.norms.append(norm)
        self.means.append(mean.detach())
        self.variances.append(variance.detach())
        self.counts.append(count)

    def update(self) -> None:
        """What BatchNorm does to its buffers: unbiased variance, `momentum` or the cumulative average."""
        if not self.norms:
            return
        if torch.compiler.is_compiling():
            self._update_in_graph()
            return
        with torch.no_grad():
            foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)
            unbiased = foreach_mul(self.variances, [count / max(1, count - 1) for count in self.counts])
            for momentum, members in self._groups().items():
                running = [self.norms[i].running_mean for i in members] + [self.norms[i].running_var for i in members]
                batch = [self.means[i] for i in members] + [unbiased[i] for i in members]
                batch = [new.to(old.dtype) for new, old in zip(batch, running, strict=True)]
                foreach_lerp_(running, batch, momentum)

    def _update_in_graph(self) -> None:
        # the compiler joins these calls itself, and a factor that is a symbol is none of foreach's scalars
        with torch.no_grad():
            for norm, mean, variance, count in zip(self.norms, self.means, self.variances, self.counts, strict=True):
                norm.num_batches_tracked.add_(1)
                unbiased = variance * (count / max(1, count - 1))
                for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                    running.lerp_(batch.to(running.dtype), norm.momentum)

    def _groups(self) -> dict[float, list[int]]:
        groups: dict[float, list[int]] = {}
        for index, norm in enumerate(self.norms):
            momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            groups.setdefault(momentum, []).append(index)
        return groups


class TrainingPlan:
    """A body's steps, found once and kept while the modules are the same; tensors are read at each call."""

    __slots__ = ("_drops", "body", "device", "dtype", "obstacle", "switches", "watch")

    def __init__(self, body: Body) -> None:
        self.body = body
        self.watch = Watch(body.owner, body.bypassed, body.settings)
        self.switches = Switches(op for step in body.fused for op in training_ops(step))
        self.obstacle = "; ".join(dict.fromkeys(_obstacles(body)))
        modules = [module for step in body.fused for module in step.modules()]
        weight = next((module.weight for module in modules if isinstance(module, nn.Conv2d)), None)
        self.dtype = None if weight is None else weight.dtype
        self.device = None if weight is None else weight.device
        self._drops = [module for module in modules if type(module) is nn.Dropout]

    def obstacle_of(self, dtype: torch.dtype, device: torch.device) -> str:
        """Why timm's own path runs on an input of `dtype` on `device`; empty: it need not."""
        if self.obstacle or self.switches.obstacle():
            return self.obstacle or self.switches.obstacle()
        if self.watch.hooked() or self.watch.backward_hooked():
            return HOOKED
        if any(drop.training and drop.p > 0 for drop in self._drops):
            return "dropout inside attention"
        if dtype != self.dtype and not torch.is_autocast_enabled(device.type):
            return f"the input is {dtype_name(dtype)}, the parameters are {dtype_name(self.dtype)}"
        if device != self.device:
            return f"the input is on {device}, the parameters are on {self.device}"
        return ""

    def titles(self) -> tuple[str, ...]:
        """ "piece: op" of each training op, in order."""
        found = [f"{step.name}: {op}" if step.name else op for step in self.body.fused for op in training_ops(step)]
        return (*found, "bn_act") if self.body.residual else tuple(found)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The block's result; running statistics are updated."""
        return written(self.advance(Pending(x)))

    def advance(self, state: Pending) -> Pending:
        """The same where the input may be pending, and the result may stay so."""
        return advance(state, self.body.steps, self.body.residual, self.body.drop_path)


def advance(state: Pending, steps: Sequence[Step], residual: bool, drop_path: nn.Module | None) -> Pending:
    """`steps` on what may be pending; the result may stay so."""
    x = None
    if residual or not isinstance(steps[0], Convolution):
        x = written(state)
        state = Pending(x)
    statistics = _Statistics()
    for step in steps:
        if isinstance(step, Own):
            state = Pending(step.module(written(state)))
        elif isinstance(step, Convolution):
            state = _convolve(step, state, statistics)
        else:
            assert isinstance(step, MultiQuery)
            state = _attend(step, written(state), statistics)
    statistics.update()
    if not residual:
        return state
    keep = _keep(drop_path, state.x)
    return Pending(_op("bn_act", state.x)(state.x, *state.norm, state.layer_scale, keep, x))


def training_ops(step: Fused) -> tuple[str, ...]:
    """The training ops that a step calls."""
    if isinstance(step, Convolution):
        return (_TRAINING_OPS[step.op],)
    return ("bn_act_dwconv", "bn_act_pwconv", "mqa") if isinstance(step, MultiQuery) else ()


def _op(name: str, x: torch.Tensor) -> Any:
    """The op called `name` for maps where `x` is; under autocast and in graphs by way of the dispatcher."""
    dispatched = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    return getattr(ops, name) if dispatched else DIRECT[name]


_TRAINING_OPS = {"dwconv_bn_act": "bn_act_dwconv", "pwconv_bn_act": "bn_act_pwconv", "conv_bn_act": "bn_act_conv"}


def _obstacles(body: Body) -> list[str]:
    if not body.fused:
        return [step.reason for step in body.own] or ["nothing that an op computes"]
    weights = [module.weight for step in body.fused for module in step.modules() if isinstance(module, nn.Conv2d)]
    reasons = [gpu.obstacle_of(body)] if any(map(leaves.on_gpu, weights)) else native.reasons()
    if len({weight.device for weight in weights}) > 1:
        reasons.append(f"parameters on {' and '.join(sorted({str(weight.device) for weight in weights}))}")
    for step in body.fused:
        if not training_ops(step):
            reasons.append(f"no training op computes the {step.name}")
        for module in step.modules():
            reasons += leaves.tensor_reasons(module)
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                reasons.append("a convolution with a bias")
    return list(filter(None, reasons))


def written(state: Pending) -> torch.Tensor:
    """The map itself, in memory."""
    if state.is_map:
        return state.x
    written: torch.Tensor = _op("bn_act", state.x)(state.x, *state.norm, state.layer_scale, None, None)
    return written


def _convolve(step: Convolution, state: Pending, statistics: _Statistics) -> Pending:
    if state.layer_scale is not None:
        state = Pending(written(state))
    conv, norm = step.conv, step.norm
    moments = norm is not None and leaves.uses_batch(norm)
    name = _TRAINING_OPS[step.op]
    geometry: list[Any] = []
    if step.op != "pwconv_bn_act":
        padding = leaves.padding_of(conv, state.x.shape[2], state.x.shape[3])
        geometry = [list(conv.stride), padding, list(conv.dilation)]
    last = (step.channels_last,) if step.op == "conv_bn_act" else ()
    z, mean, variance = _op(name, state.x)(state.x, *state.norm, conv.weight, *geometry, moments, *last)
    gamma = None if step.layer_scale is None else step.layer_scale.gamma
    return Pending(z, _normalisation(norm, z, mean, variance, step.act_name, statistics), gamma)  # type: ignore[arg-type]


def _normalisation(
    norm: Any, z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, act: str, statistics: _Statistics
) -> tuple[Any, ...]:
    """What the next op applies to `z`: batch statistics in train mode, the running ones of a frozen BatchNorm."""
    if norm is None:
        return _NOTHING if act == "none" else (*_NOTHING[:-1], act)
    if not leaves.uses_batch(norm):
        return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, act
    statistics.add(norm, mean, variance, z)
    return mean, variance, norm.weight, norm.bias, norm.eps, act


def _attend(step: MultiQuery, x: torch.Tensor, statistics: _Statistics) -> Pending:
    attention: Any = step.attention
    state = Pending(x)
    if step.norm is not None:
        mean = variance = x
        if leaves.uses_batch(step.norm):
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        state = Pending(x, _normalisation(step.norm, x, mean, variance, "none", statistics))
    query = _project(state, attention.query.proj)
    key = _rows(_path(state, attention.key, statistics))
    value = _rows(_path(state, attention.value, statistics))
    y = _op("mqa", query)(query, key, value, attention.num_heads, step.scale)
    gamma = None if step.layer_scale is None else step.layer_scale.gamma
    return Pending(_project(Pending(y), attention.output.proj), _NOTHING, gamma)  # type: ignore[arg-type]


def _project(state: Pending, conv: nn.Conv2d) -> torch.Tensor:
    projected: torch.Tensor = _op("bn_act_pwconv", state.x)(state.x, *state.norm, conv.weight, False)[0]
    return projected


def _path(state: Pending, path: Any, statistics: _Statistics) -> torch.Tensor:
    modules: dict[str, Any] = dict(path._modules)
    if "down_conv" in modules:
        state = _convolve(Convolution("", modules["down_conv"], modules["norm"]), state, statistics)
    return _project(state, modules["proj"])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, D, H, W] -> [N, P, D]; in NHWC a view."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _keep(drop_path: Any, x: torch.Tensor) -> torch.Tensor | None:
    """timm's stochastic depth, a factor an image, from the same draw of the same generator; None without."""
    if drop_path is None or not drop_path.training or not drop_path.drop_prob:
        return None
    probability = 1 - drop_path.drop_prob
    keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(probability)
    if probability > 0.0 and drop_path.scale_by_keep:
        keep.div_(probability)
    return keep.flatten()
