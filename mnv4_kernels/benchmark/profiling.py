"""Where an optimized network's time goes: each step of the engine's plan, and each block beside its own roofline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..backends import native
from ..engine import OptimizedNetwork, optimize
from ..engine.network import ProgramPart
from ..modules.program import RESULT
from ..ops.engine import engine_profile
from ..ops.engine.programs import Program, Shape, program_of
from . import rival
from .case import DTYPES, Case, create_input, create_model
from .ceilings import Ceilings, measure_ceilings
from .rounds import Protocol


@dataclass(frozen=True)
class StepTime:
    """One step of the plan: all workers, between two barriers."""

    #: timm's module whose product the step is; what rides on it may be the next block's
    block: str
    #: what it computes, "a+b": b reads what a has just written
    kernel: str
    shape: str
    flops: int
    #: microseconds, the median over runs
    us: float
    #: why this plan and no other, "" where there is nothing to choose
    reason: str


@dataclass(frozen=True)
class BlockTime:
    """The steps of one block together."""

    name: str
    flops: int
    #: weights, what it reads and what it writes, once each
    bytes: int
    #: of `bytes` the weights, which no cache has from the block before
    weight_bytes: int
    us: float


@dataclass
class Profile:
    """Steps and blocks of one case, with the ceilings measured beside them."""

    case: Case
    #: images that the engine takes at a time; times are for these
    images: int
    tier: str
    steps: list[StepTime]
    blocks: list[BlockTime]
    ceilings: Ceilings
    #: microseconds of each block in the competitor that tells them
    rival: dict[str, float] = field(default_factory=dict)
    #: why there are none
    rival_missing: str = ""

    def floor_us(self, flops: int, weight_bytes: int = 0) -> float:
        """Microseconds below which nothing can do this many operations and read these weights."""
        return max(flops / self.ceilings.gflops, weight_bytes / self.ceilings.gbytes) / 1e3

    def footnote(self) -> str:
        """What the figures refer to."""
        return (
            f"{self.images} image{'s' if self.images > 1 else ''}, tier {self.tier}; peak {self.ceilings.gflops:.0f} "
            f"GFLOP/s ({self.ceilings.source}), {self.ceilings.gbytes:.0f} GB/s. A step's time includes the wait at "
            "its barrier; what rides on a step is counted with it, also where it belongs to the next block. "
            + (f"No times of a competitor: {self.rival_missing}." if self.rival_missing else "")
        ).strip()

    def step_table(self) -> tuple[list[str], list[list[str]]]:
        """Column heads and cells, a row a step."""
        head = ["block", "kernel", "shape", "us", "GFLOP/s", "of peak", "why"]
        return head, [
            [
                step.block,
                step.kernel,
                step.shape,
                f"{step.us:.1f}",
                f"{step.flops / step.us / 1e3:.0f}" if step.flops else "",
                f"{self.floor_us(step.flops) / step.us:.0%}" if step.flops else "",
                step.reason,
            ]
            for step in self.steps
        ]

    def block_table(self) -> tuple[list[str], list[list[str]]]:
        """Column heads and cells, a row a block, and the whole."""
        head = ["block", "us", "of all", "MFLOP", "KB", "floor us", "of floor"]
        if self.rival:
            head += [f"{rival.NAME} us", "ours"]
        total = sum(block.us for block in self.blocks)
        floors = [self.floor_us(block.flops, block.weight_bytes) for block in self.blocks]
        rows = [
            self._block_cells(block.name, block.us, total, block.flops, block.bytes, floor)
            for block, floor in zip(self.blocks, floors, strict=True)
        ]
        flops, moved = (sum(values) for values in zip(*((one.flops, one.bytes) for one in self.blocks), strict=True))
        rows.append(self._block_cells("(all)", total, total, flops, moved, sum(floors)))
        if self.rival:
            theirs = [*self._rival_blocks(), sum(self.rival.values())]
            for cells, ours, us in zip(rows, [*(block.us for block in self.blocks), total], theirs, strict=True):
                cells += [f"{us:.1f}", f"{us / ours:.2f}x"] if us else ["", ""]
        return head, rows

    def _rival_blocks(self) -> list[float]:
        """The competitor's times for `blocks`; a block that rides on ours before it is counted there here, too."""
        found = dict.fromkeys((block.name for block in self.blocks), 0.0)
        name = next(iter(found))
        for rival_name, us in self.rival.items():
            name = rival_name if rival_name in found else name
            found[name] += us
        return list(found.values())

    def _block_cells(self, name: str, us: float, total: float, flops: int, moved: int, floor: float) -> list[str]:
        share = f"{floor / us:.0%}" if flops else ""
        return [
            name,
            f"{us:.1f}",
            f"{us / total:.1%}",
            f"{flops / 1e6:.1f}",
            f"{moved / 1e3:.0f}",
            f"{floor:.1f}",
            share,
        ]


def profile(
    case: Case,
    repeats: int = 50,
    protocol: Protocol | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Profiles `case`'s optimized network, and a competitor's; a step's time includes the wait at its barrier.

    Args:
        case: model, input, dtype and threads.
        repeats: runs of which the medians are taken.
        protocol: the folders of the competitor's environment and file; None: no competitor.
        progress: called with what is being done.

    Raises:
        OptimizeError: the C++ library is missing, or a piece has no place in a program.
    """
    case = case.resolved()
    theirs, missing = rival.block_times(case, protocol, repeats, progress) if protocol else ({}, "")
    torch.set_num_threads(case.threads)
    dtype = DTYPES[case.dtype]
    progress(f"{case.title}: profile of ours")
    with torch.no_grad():
        network = optimize(create_model(case), dtype, strict=True)
        x = create_input(case).to(dtype)
        network(x)
        found = _profile(case, network, x, repeats)
    found.rival, found.rival_missing = theirs, missing
    return found


def _profile(case: Case, network: OptimizedNetwork, x: torch.Tensor, repeats: int) -> Profile:
    (part,) = network.parts
    assert isinstance(part, ProgramPart)
    program = program_of(part._handle)
    seconds, nodes, kernels = engine_profile(part._handle, x, RESULT, repeats)
    times: dict[int, dict[str, float]] = {}
    reasons: dict[tuple[int, str], str] = {}
    for node, what, us in zip(
        nodes.tolist(), kernels.split(";"), (seconds.median(0).values * 1e6).tolist(), strict=True
    ):
        # a step that runs in several turns of images is there once a turn
        phases = times.setdefault(node, {})
        kernel, _, reason = what.partition("|")
        reasons[node, kernel] = reason
        phases[kernel] = phases.get(kernel, 0.0) + us
    # the engine takes so many images at a time; the first such part is what was profiled
    images = min(x.shape[0], native.module().engine_most_images())
    reader = _Reader(program, part, (images, *x.shape[1:]), set(times))
    steps: list[StepTime] = []
    blocks: dict[str, list[int]] = {}
    for node, phases in times.items():
        for kernel, us in phases.items():
            # attention's phases share one node, whose operations are not told apart
            flops = reader.flops(node) if len(phases) == 1 else 0
            steps.append(StepTime(reader.block(node), kernel, reader.shape(node), flops, us, reasons[node, kernel]))
        blocks.setdefault(reader.block(node), []).append(node)
    itemsize = DTYPES[case.dtype].itemsize
    found = [
        BlockTime(
            name,
            sum(reader.flops(node) for node in members),
            itemsize * (reader.weights(members) + reader.activations(members)),
            itemsize * reader.weights(members),
            sum(sum(times[node].values()) for node in members),
        )
        for name, members in blocks.items()
    ]
    ceilings = measure_ceilings(DTYPES[case.dtype], case.threads, max(block.bytes for block in found))
    return Profile(case, images, native.module().active_tier(), steps, found, ceilings)


class _Reader:
    """What a program's rows say of the nodes that have a step of their own, `stepped`."""

    def __init__(self, program: Program, part: ProgramPart, x: Shape, stepped: set[int]) -> None:
        self._rows = program.rows
        self._kinds = [program.kinds[row["kind"]] for row in program.rows]
        self._shapes = program.shapes(x)
        self._names = part.names
        self._arrays = part.arrays
        #: node -> the nodes that its step computes: itself, what reads its result at once, and so on
        self._members = {node: [node] for node in stepped}
        step_of = {node: node for node in stepped}
        for node, row in enumerate(self._rows):
            if node not in stepped and row["input"] in step_of and self._kinds[node] not in ("input", "output"):
                step_of[node] = step_of[row["input"]]
                self._members[step_of[node]].append(node)

    def block(self, node: int) -> str:
        return self._names[node] or self._kinds[node]

    def shape(self, node: int) -> str:
        row, y = self._rows[node], self._shapes[node]
        channels = self._shapes[row["input"]][1] if row["input"] >= 0 else y[1]
        size = f" {y[2]}x{y[3]}" if len(y) == 4 else ""
        kernel = f" k{row['kernel_h']} s{row['stride_h']}" if row["kernel_h"] > 1 else ""
        return f"{channels}->{y[1]}{size}{kernel}"

    def flops(self, node: int) -> int:
        """Operations of the node's step."""
        return sum(self._own_flops(member) for member in self._members[node])

    def _own_flops(self, node: int) -> int:
        row, kind, y = self._rows[node], self._kinds[node], self._shapes[node]
        if kind in ("input", "output", "pool"):
            return 0
        x = self._shapes[row["input"]]
        if kind == "attention":
            return self._attention_flops(row, x)
        # a weight is [outputs, inputs of a group, kernel]: each output takes as many products
        return 2 * math.prod(y) * self._arrays[row["weight"]][0].numel()

    def _attention_flops(self, row: dict[str, int], x: Shape) -> int:
        images, _, height, width = x
        arrays = self._arrays[row["weight"] :]
        queries = images * height * width
        down = arrays[4].numel() > 0
        keys = images * -(-height // row["stride_h"]) * -(-width // row["stride_w"]) if down else queries
        scores = 2 * queries * (keys // images) * row["heads"] * (row["key_dim"] + row["value_dim"])
        total = scores + 2 * queries * (arrays[2].numel() + arrays[12].numel())
        # the key's and the value's depthwise and projection
        return total + 2 * keys * sum(arrays[index].numel() for index in (4, 6, 8, 10))

    def _all(self, nodes: list[int]) -> set[int]:
        return {member for node in nodes for member in self._members[node]}

    def weights(self, nodes: list[int]) -> int:
        """Numbers in the arrays that the steps of `nodes` multiply by."""
        starts = [row["weight"] for row in self._rows] + [len(self._arrays)]
        total = 0
        for member in self._all(nodes):
            if self._kinds[member] not in ("input", "output", "pool"):
                first = starts[member]
                last = min((start for start in starts if start > first), default=first)
                total += sum(array.numel() for array in self._arrays[first:last])
        return total

    def activations(self, nodes: list[int]) -> int:
        """Numbers that come to the steps of `nodes` from elsewhere, and that go elsewhere."""
        members = self._all(nodes)
        sources = {self._rows[member][name] for member in members for name in ("input", "residual")} - members - {-1}
        leaving = {
            row["input"] for node, row in enumerate(self._rows) if node not in members and row["input"] in members
        }
        return sum(math.prod(self._shapes[node]) for node in sources | leaving)
