"""The gate: which kernels a block runs, chosen from its shape and dtype by predicted time, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from . import heuristics, traffic
from .traffic import Ceilings, Cost

#: A fusion must be predicted to save this share of the time: the model is not more exact than that.
MARGIN = 0.03


#: Widest hidden tensor that one program of `conv_pwconv` holds.
MAX_PAIR_HIDDEN = 256


#: Widest output that one program of `mqa_projected` accumulates.
MAX_PROJECTED_OUTPUTS = 256


#: Widest output that one program of both products of a block accumulates.
MAX_PRODUCTS_OUTPUTS = 256


@dataclass(frozen=True)
class UibShape:
    """A UniversalInvertedResidual: kernel 0 where a depthwise convolution is missing; the stride is of dw_mid,
    or of dw_start where there is no dw_mid."""

    batch: int
    channels: int
    hidden: int
    outputs: int
    height: int
    width: int
    start_kernel: int = 0
    mid_kernel: int = 0
    start_stride: int = 1
    mid_stride: int = 1
    residual: bool = False

    @property
    def middle(self) -> tuple[int, int]:
        """Height and width of the expanded tensor."""
        return _ceil(self.height, self.start_stride), _ceil(self.width, self.start_stride)

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return _ceil(self.middle[0], self.mid_stride), _ceil(self.middle[1], self.mid_stride)


@dataclass(frozen=True)
class ConvPairShape:
    """A dense convolution with an activation, and the 1x1 convolution behind it: an EdgeResidual."""

    batch: int
    channels: int
    hidden: int
    outputs: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    residual: bool = False

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return _ceil(self.height, self.stride), _ceil(self.width, self.stride)


@dataclass(frozen=True)
class DepthwisePairShape:
    """A depthwise convolution and the 1x1 convolution behind it; the size is the depthwise convolution's output."""

    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    residual: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """Attention between its projections: `positions` queries of each head and `keys` keys an image."""

    batch: int
    channels: int
    outputs: int
    positions: int
    keys: int
    heads: int
    key_depth: int
    value_depth: int
    residual: bool = False


def _ceil(size: int, stride: int) -> int:
    return -(-size // stride)


@dataclass(frozen=True)
class Step:
    """One launch of a plan."""

    op: str
    role: str
    cost: Cost
    us: float


@dataclass(frozen=True)
class Plan:
    """The launches of a block for `images` images at a time, in order, with their predicted cost.

    With fewer images than the batch, the launches repeat over one scratch tensor, which stays in L2.
    """

    name: str
    steps: tuple[Step, ...]
    fuse_start: bool
    fuse_mid: bool
    images: int
    repeats: int
    fuse_products: bool = False

    @property
    def us(self) -> float:
        """Predicted microseconds."""
        return self.repeats * sum(step.us for step in self.steps)

    @property
    def memory(self) -> float:
        """Predicted bytes to and from memory."""
        return self.repeats * sum(step.cost.memory for step in self.steps)

    @property
    def launches(self) -> int:
        """Kernels launched."""
        return self.repeats * len(self.steps)


@dataclass(frozen=True)
class Decision:
    """The plan that was chosen, every other with the reason, and why there is no plan of fewer launches."""

    plan: Plan
    declined: tuple[tuple[Plan, str], ...] = field(default=())
    impossible: str = ""

    def explain(self) -> str:
        """One line for the choice, one for each plan that was declined, and one for what no kernel can do."""
        chosen = " -> ".join(f"{step.op}({step.role})" for step in self.plan.steps)
        times = f", {self.plan.repeats} times {self.plan.images} images" if self.plan.repeats > 1 else ""
        cost = f"predicted {self.plan.us:.1f} us, {self.plan.memory / 2**20:.1f} MiB"
        lines = [f"{self.plan.name}: {chosen}{times}; {cost}"]
        lines += [f"  not {plan.name}: {reason}" for plan, reason in self.declined]
        if self.impossible:
            lines.append(f"  not in one launch: {self.impossible}")
        return "\n".join(lines)


def _depthwise(shape: tuple[int, ...], kernel: int, stride: int, role: str, size: int, ceilings: Ceilings) -> Step:
    kernels, strides = (kernel, kernel), (stride, stride)
    config = heuristics.depthwise(shape, kernels, strides, size, ceilings.multiprocessors)
    cost = traffic.depthwise(shape, kernels, strides, size, config)
    return Step("dwconv_bn_act", role, cost, cost.us(ceilings))


def _pointwise(m: int, n: int, k: int, residual: bool, role: str, size: int, ceilings: Ceilings) -> Step:
    config = heuristics.gemm(m, n, k, size, ceilings.multiprocessors)
    cost = traffic.gemm(m, n, k, size, config, residual)
    return Step("pwconv_bn_act", role, cost, cost.us(ceilings))


def _fused(
    shape: tuple[int, ...], n: int, kernel: int, stride: int, residual: bool, role: str, size: int, ceilings: Ceilings
) -> Step:
    config = heuristics.depthwise_gemm(shape, n, size, ceilings.multiprocessors)
    cost = traffic.depthwise_gemm(shape, n, (kernel, kernel), (stride, stride), size, config, residual)
    return Step("dwconv_pwconv", role, cost, cost.us(ceilings))


def _expanding(shape: UibShape, fuse: bool, size: int, ceilings: Ceilings) -> list[Step]:
    start = (shape.batch, shape.channels, *shape.middle)
    if fuse:
        return [
            _fused(
                start, shape.hidden, shape.start_kernel, shape.start_stride, False, "dw_start + pw_exp", size, ceilings
            )
        ]
    m = shape.batch * shape.middle[0] * shape.middle[1]
    expand = _pointwise(m, shape.hidden, shape.channels, False, "pw_exp", size, ceilings)
    if not shape.start_kernel:
        return [expand]
    return [_depthwise(start, shape.start_kernel, shape.start_stride, "dw_start", size, ceilings), expand]


def _projecting(shape: UibShape, fuse: bool, size: int, ceilings: Ceilings) -> list[Step]:
    mid = (shape.batch, shape.hidden, *shape.out)
    if fuse:
        return [
            _fused(
                mid, shape.outputs, shape.mid_kernel, shape.mid_stride, shape.residual, "dw_mid + pw_proj", size,
                ceilings,
            )
        ]  # fmt: skip
    m = shape.batch * shape.out[0] * shape.out[1]
    project = _pointwise(m, shape.outputs, shape.hidden, shape.residual, "pw_proj", size, ceilings)
    if not shape.mid_kernel:
        return [project]
    return [_depthwise(mid, shape.mid_kernel, shape.mid_stride, "dw_mid", size, ceilings), project]


def _intermediates(shape: UibShape, fuse_start: bool, fuse_mid: bool) -> list[int]:
    """Elements an image of each tensor between two launches."""
    found = []
    if shape.start_kernel and not fuse_start:
        found.append(shape.channels * shape.middle[0] * shape.middle[1])
    found.append(shape.hidden * shape.middle[0] * shape.middle[1])
    if shape.mid_kernel and not fuse_mid:
        found.append(shape.hidden * shape.out[0] * shape.out[1])
    return found


def _resident(steps: list[Step], between: list[int], budget: float, ceilings: Ceilings) -> tuple[Step, ...]:
    """The steps without the memory traffic of the tensors between them that stay in L2 until they are read."""
    kept = list(steps)
    for index, size in enumerate(between):
        # the writer's and the reader's other tensors pass through L2 as well: hence the budget of half of it
        if size > budget:
            continue
        for position in (index, index + 1):
            cost = replace(kept[position].cost, memory=max(0.0, kept[position].cost.memory - size))
            kept[position] = replace(kept[position], cost=cost, us=cost.us(ceilings))
    return tuple(kept)


def uib_plans(shape: UibShape, element_size: int = 2, ceilings: Ceilings | None = None) -> list[Plan]:
    """Every plan that the kernels can run for a block, the unfused one of the whole batch first.

    Where the tensors between the launches overflow L2, each fusion is also planned for as many images at a
    time as fit half of it: more launches, but the expanded tensor never reaches memory.
    """
    ceilings = (ceilings or Ceilings()).for_element_size(element_size)
    budget = ceilings.l2_bytes / 2
    plans = []
    for fuse_start in (False, True) if shape.start_kernel else (False,):
        for fuse_mid in (False, True) if shape.mid_kernel else (False,):
            fused = [name for name, fuse in (("dw_start", fuse_start), ("dw_mid", fuse_mid)) if fuse]
            name = f"{' and '.join(fused)} fused" if fused else "unfused"
            between = [count * element_size for count in _intermediates(shape, fuse_start, fuse_mid)]
            images = max(1, int(budget // max(between)))
            choices = [(shape.batch, name)]
            if images < shape.batch:
                choices.append((images, f"{name}, expanded tensor in L2"))
            for count, label in choices:
                part = replace(shape, batch=count)
                steps = _expanding(part, fuse_start, element_size, ceilings)
                steps += _projecting(part, fuse_mid, element_size, ceilings)
                kept = _resident(steps, [size * count for size in between], budget, ceilings)
                plans.append(Plan(label, kept, fuse_start, fuse_mid, count, _ceil(shape.batch, max(1, count))))
    if not shape.mid_kernel and shape.outputs <= MAX_PRODUCTS_OUTPUTS:
        plans.append(_products_plan(shape, element_size, ceilings))
    return plans


def _products_plan(shape: UibShape, size: int, ceilings: Ceilings) -> Plan:
    """Both products in one launch, which keeps the expanded rows on chip; dw_start before it in its own."""
    m = shape.batch * shape.middle[0] * shape.middle[1]
    given = (m, shape.channels, shape.hidden, shape.outputs, size)
    cost = traffic.expand_project(*given, heuristics.expand_project(*given, ceilings.multiprocessors), shape.residual)
    steps = [Step("expand_project", "pw_exp + pw_proj", cost, cost.us(ceilings))]
    between = []
    if shape.start_kernel:
        start = (shape.batch, shape.channels, *shape.middle)
        steps.insert(0, _depthwise(start, shape.start_kernel, shape.start_stride, "dw_start", size, ceilings))
        between.append(m * shape.channels * size)
    kept = _resident(steps, between, ceilings.l2_bytes / 2, ceilings)
    return Plan("products fused", kept, False, False, shape.batch, 1, fuse_products=True)


def conv_pair_plans(shape: ConvPairShape, element_size: int = 2, ceilings: Ceilings | None = None) -> list[Plan]:
    """Two launches, and one where a program can hold the hidden rows of its pixels."""
    ceilings = (ceilings or Ceilings()).for_element_size(element_size)
    m, taps = shape.batch * shape.out[0] * shape.out[1], shape.kernel**2
    size, out = (shape.height, shape.width), shape.out
    config = heuristics.gemm(m, shape.hidden, shape.channels, element_size, ceilings.multiprocessors, taps=taps)
    cost = traffic.conv(shape.batch, shape.channels, shape.hidden, size, out, taps, element_size, config)
    conv = Step("conv_bn_act", "conv", cost, cost.us(ceilings))
    project = _pointwise(m, shape.outputs, shape.hidden, shape.residual, "project", element_size, ceilings)
    between = [m * shape.hidden * element_size]
    steps = _resident([conv, project], between, ceilings.l2_bytes / 2, ceilings)
    plans = [Plan("unfused", steps, False, False, shape.batch, 1)]
    if shape.hidden <= MAX_PAIR_HIDDEN:
        config = heuristics.conv_pair(
            m, shape.hidden, shape.outputs, shape.channels, element_size, ceilings.multiprocessors
        )
        cost = traffic.conv_pair(
            shape.batch, shape.channels, shape.hidden, shape.outputs, size, out, taps, element_size, config,
            shape.residual,
        )  # fmt: skip
        step = Step("conv_pwconv", "conv + project", cost, cost.us(ceilings))
        plans.append(Plan("conv fused", (step,), False, True, shape.batch, 1))
    return plans


def depthwise_pair_plans(
    shape: DepthwisePairShape, element_size: int = 2, ceilings: Ceilings | None = None
) -> list[Plan]:
    """Two launches, and one that computes the depthwise as the product's operand."""
    ceilings = (ceilings or Ceilings()).for_element_size(element_size)
    out = (shape.batch, shape.channels, shape.height, shape.width)
    m = shape.batch * shape.height * shape.width
    first = _depthwise(out, shape.kernel, shape.stride, "depthwise", element_size, ceilings)
    second = _pointwise(m, shape.outputs, shape.channels, shape.residual, "product", element_size, ceilings)
    between = [m * shape.channels * element_size]
    fused = _fused(
        out, shape.outputs, shape.kernel, shape.stride, shape.residual, "depthwise + product", element_size, ceilings
    )
    return [
        Plan(
            "unfused", _resident([first, second], between, ceilings.l2_bytes / 2, ceilings), False, False,
            shape.batch, 1,
        ),
        Plan("depthwise fused", (fused,), False, True, shape.batch, 1),
    ]  # fmt: skip


def attention_plans(shape: AttentionShape, element_size: int = 2, ceilings: Ceilings | None = None) -> list[Plan]:
    """Three launches, and one where a program can hold the keys and the output of its rows."""
    ceilings = (ceilings or Ceilings()).for_element_size(element_size)
    processors, depth = ceilings.multiprocessors, max(shape.key_depth, shape.value_depth)
    m, rows = shape.batch * shape.positions, shape.positions * shape.heads
    inner = shape.heads * depth
    query = _pointwise(m, shape.heads * shape.key_depth, shape.channels, False, "query", element_size, ceilings)
    config = heuristics.attention(rows, shape.keys, depth, shape.batch, element_size, processors)
    cost = traffic.attention(shape.batch, rows, shape.keys, depth, element_size, config)
    attend = Step("mqa", "attention", cost, cost.us(ceilings))
    output = _pointwise(
        m, shape.outputs, shape.heads * shape.value_depth, shape.residual, "output", element_size, ceilings
    )
    between = [m * inner * element_size] * 2
    steps = _resident([query, attend, output], between, ceilings.l2_bytes / 2, ceilings)
    plans = [Plan("unfused", steps, False, False, shape.batch, 1)]
    config = heuristics.projected_attention(shape.positions, shape.keys, depth, shape.batch, element_size, processors)
    if shape.outputs <= MAX_PROJECTED_OUTPUTS and shape.keys <= config.keys:
        cost = traffic.projected_attention(
            shape.batch, shape.positions, shape.keys, shape.heads, depth, shape.channels, shape.outputs,
            element_size, config, shape.residual,
        )  # fmt: skip
        step = Step("mqa_projected", "query, attention, output", cost, cost.us(ceilings))
        plans.append(Plan("projections fused", (step,), False, True, shape.batch, 1))
    return plans


@lru_cache(maxsize=1024)
def depthwise_pair(shape: DepthwisePairShape, element_size: int = 2, ceilings: Ceilings | None = None) -> Decision:
    """The faster plan of a depthwise convolution and the product behind it."""
    return _decide(depthwise_pair_plans(shape, element_size, ceilings))


@lru_cache(maxsize=1024)
def attention(shape: AttentionShape, element_size: int = 2, ceilings: Ceilings | None = None) -> Decision:
    """The faster plan of attention between its projections."""
    plans = attention_plans(shape, element_size, ceilings)
    too_much = f"a program holds no {shape.outputs} outputs beside {shape.keys} keys"
    return _decide(plans, "" if len(plans) > 1 else too_much)


@lru_cache(maxsize=1024)
def uib(shape: UibShape, element_size: int = 2, ceilings: Ceilings | None = None) -> Decision:
    """The fastest plan of a block by prediction; a fusion that saves less than `MARGIN` is declined."""
    if shape.mid_kernel:
        impossible = "dw_mid reads the neighbours of an expanded pixel, and Triton can't shift a tile"
    elif shape.outputs > MAX_PRODUCTS_OUTPUTS:
        impossible = f"a program holds {MAX_PRODUCTS_OUTPUTS} outputs, not {shape.outputs}"
    else:
        impossible = ""
    return _decide(uib_plans(shape, element_size, ceilings), impossible)


@lru_cache(maxsize=1024)
def conv_pair(shape: ConvPairShape, element_size: int = 2, ceilings: Ceilings | None = None) -> Decision:
    """The same of a dense convolution and the 1x1 convolution behind it."""
    too_wide = f"a program holds {MAX_PAIR_HIDDEN} hidden channels, not {shape.hidden}"
    plans = conv_pair_plans(shape, element_size, ceilings)
    return _decide(plans, too_wide if shape.hidden > MAX_PAIR_HIDDEN else "")


def _decide(plans: list[Plan], impossible: str = "") -> Decision:
    best = plans[0]
    for plan in plans[1:]:
        if plan.us < best.us * (1 - MARGIN):
            best = plan
    declined = tuple((plan, _reason(plan, best)) for plan in plans if plan is not best)
    return Decision(best, declined, impossible)


def _reason(plan: Plan, best: Plan) -> str:
    if plan.us < best.us:
        return f"predicted {plan.us:.1f} us saves less than {MARGIN:.0%} of {best.us:.1f} us"
    return f"predicted {plan.us:.1f} us, {plan.memory / 2**20:.1f} MiB, against {best.us:.1f} us"
