"""A body for a GPU: its steps gathered into the ops of blocks and half blocks, whose launchers ask the gate.

On a CPU one op a step is what its cache asks for. On a GPU what passes between two launches goes
through memory, so as many steps as an op can take become one call; which kernels that call
launches, the gate decides from the input's shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..backends import cuda
from . import folding, leaves
from .body import Body
from .multi_query import MultiQuery, gamma_of, path_of, projection_of
from .steps import Call, Convolution, Fused, Own, Run, Step, chained

#: (input, residual or None) -> an op's arguments
Arguments = Callable[[torch.Tensor, torch.Tensor | None], tuple[Any, ...]]

#: what the first convolution of a half block is -> the op of both
_HALVES = {"dwconv_bn_act": "dwconv_pwconv", "conv_bn_act": "conv_pwconv"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Steps that one op computes."""

    op: str
    steps: tuple[Step, ...]
    #: the op adds the block's input itself
    adds_input: bool = False

    @property
    def name(self) -> str:
        """The pieces' names."""
        return " + ".join(step.name for step in self.steps)

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`."""
        for step in self.steps:
            assert not isinstance(step, Own)
            x = step.fake(x)
        return x

    def arguments(self) -> Arguments:
        """Reads the tensors; returns what makes the op's arguments of an input."""
        if self.op == "uib":
            return _uib_arguments(self.steps, self.adds_input)  # type: ignore[arg-type]
        return _pair_arguments(*self.steps)  # type: ignore[arg-type]

    def prepare(self) -> Call:
        """Reads the tensors; returns the folded call."""
        op, arguments = getattr(ops, self.op), self.arguments()

        def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            y: torch.Tensor = op(*arguments(x, residual))
            return y

        return call


Item = Group | Fused | Own


def gathered(body: Body) -> list[Item]:
    """The body's steps, with those that one op takes as groups."""
    if _is_uib(body.steps):
        return [Group("uib", tuple(body.steps), body.residual)]
    found: list[Item] = []
    rest = list(body.steps)
    while rest:
        step = rest.pop(0)
        after = rest[0] if rest else None
        half = _HALVES.get(step.op) if isinstance(step, Convolution) and not step.channels_last else None
        if half is not None and isinstance(after, Convolution) and after.op == "pwconv_bn_act":
            found.append(Group(half, (step, rest.pop(0))))
        else:
            found.append(step)
    return found


def ops_of(body: Body) -> list[str]:
    """The ops whose switches hold for a body on a GPU."""
    groups = [item.op for each in _bodies(body) for item in gathered(each) if isinstance(item, Group)]
    projected = [op for each in _bodies(body) for step in each.fused for op in _ops_on_gpu(step)]
    return [*groups, *projected, *(op for step in body.fused for op in step.ops)]


def obstacle_of(body: Body) -> str:
    """Why no Triton kernel can run the body, as a sentence; empty: they can."""
    reasons = list(cuda.reasons())
    for step in (step for each in _bodies(body) for step in each.fused):
        if isinstance(step, MultiQuery):
            attention: Any = step.attention
            widest, most = max(attention.key_dim, attention.value_dim), cuda.MAX_DEPTH["mqa"]
            if widest > most:
                reasons.append(f"keys and values of {widest} channels; the Triton kernels take {most}")
    return "; ".join(reasons)


def in_order(body: Body) -> Run:
    """One function for a body: its groups folded, called in order, and the skip."""
    items = gathered(body)
    calls = [item.module if isinstance(item, Own) else _prepared(item) for item in items]
    last = items[-1]
    if isinstance(last, Group) and last.adds_input:
        return calls[0]
    takes_residual = isinstance(last, Group) or (not isinstance(last, Own) and last.takes_residual)
    return chained(calls, body.residual, takes_residual)


def explain(body: Body, x: torch.Tensor) -> tuple[list[str], list[str]]:
    """("pieces: op" of each call, what the gate says of each) for an input like `x`.

    Behind a piece of timm's own the gate is not asked: what reaches its ops is known only when it runs.
    """
    titles, decisions = [], []
    known = True
    with torch.no_grad():
        for item in gathered(body):
            if isinstance(item, Own):
                known = False
                continue
            names = [item.op] if isinstance(item, Group) else _ops_on_gpu(item)
            titles += [f"{item.name}: {op}" if item.name else op for op in names]
            if known and isinstance(item, Group):
                decisions.append(cuda.decision(item.op, item.arguments()(x, x)))
            elif known and isinstance(item, MultiQuery):
                decisions.append(cuda.decision("mqa_projected", _Attention(item).projected(x, x)))
            if known:
                x = item.fake(x)
    return titles, [text for text in decisions if text]


def _bodies(body: Body) -> Iterator[Body]:
    """The body, and those of the blocks that are its steps."""
    yield body
    for step in body.fused:
        # a network's parts and a block's body; their classes can't be imported below the drop-ins
        for part in getattr(step, "parts", (step,)):
            inner = getattr(part, "body", None)
            if inner is not None:
                yield inner


def _ops_on_gpu(step: Fused) -> list[str]:
    if isinstance(step, MultiQuery):
        return ["kv_downsample", "mqa_projected"]
    return list(dict.fromkeys(step.ops))


def _prepared(item: Group | Fused) -> Call:
    return _Attention(item).prepare() if isinstance(item, MultiQuery) else item.prepare()


def _is_uib(steps: Sequence[Step]) -> bool:
    """True for [depthwise] expand [depthwise] project, with the activations that the op `uib` knows."""
    convs = [step for step in steps if isinstance(step, Convolution) and not step.channels_last]
    kinds = [step.op for step in convs]
    products = [index for index, kind in enumerate(kinds) if kind == "pwconv_bn_act"]
    if len(convs) != len(steps) or len(products) != 2 or products[-1] != len(kinds) - 1 or products[0] > 1:
        return False
    if set(kinds) - {"pwconv_bn_act", "dwconv_bn_act"} or products[1] - products[0] > 2:
        return False
    start, expand, mid, project = _parts(convs)
    quiet = project.act_name == "none" and (start is None or start.act_name == "none")
    return quiet and expand.layer_scale is None and (mid is None or mid.act_name == expand.act_name)


def _parts(
    steps: Sequence[Convolution],
) -> tuple[Convolution | None, Convolution, Convolution | None, Convolution]:
    """dw_start, pw_exp, dw_mid, pw_proj."""
    rest = list(steps)
    start = rest.pop(0) if rest[0].op == "dwconv_bn_act" else None
    expand = rest.pop(0)
    mid = rest.pop(0) if len(rest) == 2 else None
    return start, expand, mid, rest[0]


def _folded(step: Convolution) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(weight, scale, shift) of a step, on its device."""
    gamma = gamma_of(step.layer_scale)
    scale, shift = folding.epilogue_of(step.conv, step.norm, gamma)
    operands = folding.operands(step.conv.weight.detach().double(), scale, shift, step.conv.weight.dtype, step.op)
    return operands.weight, operands.scale, operands.shift


def _geometry(conv: nn.Conv2d, height: int, width: int) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation) for an input of that size."""
    return list(conv.stride), leaves.padding_of(conv, height, width), list(conv.dilation)


def _pair_arguments(first: Convolution, second: Convolution) -> Arguments:
    head, tail = _folded(first), _folded(second)

    def arguments(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[Any, ...]:
        geometry = _geometry(first.conv, x.shape[2], x.shape[3])
        return (x, *head, *geometry, first.act_name, *tail, second.act_name, None, residual)

    return arguments


def _uib_arguments(steps: Sequence[Convolution], residual: bool) -> Arguments:
    start, expand, mid, project = _parts(steps)
    nothing = (None, None, None)
    weights = [nothing if step is None else _folded(step) for step in (start, expand, mid, project)]

    def geometry(step: Convolution | None, size: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
        return ([1, 1], [0, 0, 0, 0], [1, 1]) if step is None else _geometry(step.conv, *size)

    def arguments(x: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
        size = (x.shape[2], x.shape[3])
        middle = size if start is None else leaves.output_size(start.conv, *size)
        return (
            x, *weights[0], *geometry(start, size), *weights[1], *weights[2], *geometry(mid, middle),
            expand.act_name, *weights[3], None, residual,
        )  # fmt: skip

    return arguments


class _Attention:
    """Attention as two ops: keys and values; queries, attention and output."""

    def __init__(self, step: MultiQuery) -> None:
        attention: Any = step.attention
        queries: nn.Conv2d = step.path("query")["proj"]
        output: nn.Conv2d = step.path("output")["proj"]
        keys, values = step.path("key"), step.path("value")
        dtype = queries.weight.dtype
        norm = None if step.norm is None else folding.affine_of(step.norm)
        conv = keys.get("down_conv")
        self.normalise = None
        if norm is not None and conv is not None:
            # the shift doesn't fold past the depthwise convolution's zero padding: normalise first, exactly
            self.normalise = [value.to(dtype).view(1, -1, 1, 1) for value in norm]
            norm = None
        weight, shift = projection_of(queries, norm)
        self.query = (folding.laid_out(weight.to(dtype)), None, None if shift is None else shift.float())
        self.paths = (*_laid_out(path_of(keys, norm).arguments), *_laid_out(path_of(values, norm).arguments))
        self.conv = conv
        gamma = gamma_of(step.layer_scale)
        self.output = folding.laid_out(output.weight.detach())
        self.gamma = None if gamma is None else gamma.detach().float()
        self.bias = None if output.bias is None else output.bias.detach().float()
        self.scores = (attention.num_heads, step.scale)

    def _source(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.normalise is None else torch.addcmul(self.normalise[1], x, self.normalise[0])

    def _keys_and_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        geometry: tuple[list[int], list[int], list[int]] = ([1, 1], [0, 0, 0, 0], [1, 1])
        if self.conv is not None:
            geometry = _geometry(self.conv, source.shape[2], source.shape[3])
        found: tuple[torch.Tensor, torch.Tensor] = ops.kv_downsample(source, *self.paths, *geometry, None)
        return found

    def projected(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[Any, ...]:
        """The arguments of `mqa_projected`."""
        source = self._source(x)
        key, value = self._keys_and_values(source)
        return (source, *self.query, key, value, self.output, self.gamma, residual, *self.scores)

    def prepare(self) -> Call:
        """The folded call."""
        if self.bias is None:
            return lambda x, residual=None: ops.mqa_projected(*self.projected(x, residual))

        def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            source = self._source(x)
            paths = self._keys_and_values(source)
            query = ops.pwconv_bn_act(source, *self.query, "none", None, None, None)
            mixed = ops.mqa(query, *paths, *self.scores)
            y: torch.Tensor = ops.pwconv_bn_act(mixed, self.output, None, self.bias, "none", self.gamma, residual, None)
            return y

        return call


def _laid_out(path: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor]) -> Any:
    down, scale, shift, project = path
    return (None if down is None else folding.laid_out(down), scale, shift, folding.laid_out(project))
