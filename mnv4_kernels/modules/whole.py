"""A network without a piece that is timm's alone as one step: one program of the engine, in one call.

Op by op, a batch's activations pass through memory between any two of them, and each
call costs microseconds; the engine keeps what it can in cache, in one parallel region.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ..backends import native
from ..ops.engine import Engine, encode, engine_run, made, program_pack, program_run
from . import leaves
from .program import RESULT, ProgramBuilder, UnsupportedError
from .section import Section
from .steps import Call, Convolution, Fused


@dataclasses.dataclass(frozen=True)
class Whole:
    """Stem, blocks and head of a network all of whose pieces are ops."""

    name: str
    parts: tuple[Fused, ...]

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops whose switches hold for the network."""
        return tuple(op for part in self.parts for op in part.ops)

    @property
    def takes_residual(self) -> bool:
        """A network has no skip."""
        return False

    def modules(self) -> list[nn.Module]:
        """The modules that the program stands in for."""
        return [module for part in self.parts for module in part.modules()]

    def tensors(self) -> list[torch.Tensor | None]:
        """Those of its parts, in order."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def formula(self, x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """What timm computes in eval mode, in plain differentiable torch, over `tensors()`."""
        y, start = x, 0
        for part in self.parts:
            end = start + len(part.tensors())
            y = part.formula(y, tensors[start:end])
            start = end
        return y

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, like the result on `x`, whose sizes may be symbols."""
        for part in self.parts:
            x = part.fake(x)
        return x

    def has_program(self) -> bool:
        """True where the engine can take all parts."""
        return self._builder() is not None

    def prepare(self) -> Call:
        """The program's call; the parts' own, one after the other, where the engine can't take them."""
        return self._program() or self._calls()

    def _program(self) -> Call | None:
        builder = self._builder()
        if builder is None:
            return None
        engine = Engine(*builder.finish(), builder.bfloat16)

        def call(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = engine_run(engine.handle, x, RESULT)[0]
            return y.to(x.dtype)

        return call

    def traced(self, x: torch.Tensor) -> torch.Tensor | None:
        """The result on `x` by ops whose arguments are folded from the parameters at each call; None: no program."""
        builder = self._builder()
        if builder is None:
            return None
        text = encode(builder.rows)
        packed = program_pack(text, [made(array) for array in builder.arrays], builder.bfloat16)
        y: torch.Tensor = program_run(text, packed, x, builder.bfloat16, RESULT)[0]
        return y.to(x.dtype)

    def _builder(self) -> ProgramBuilder | None:
        stem = self.parts[0]
        if not native.available() or not isinstance(stem, Convolution) or leaves.on_gpu(stem.conv.weight):
            return None
        builder = ProgramBuilder(stem.conv.in_channels, stem.conv.weight.dtype)
        node = 0
        try:
            for part in self.parts:
                if isinstance(part, Section):
                    node = builder.steps(part.body.steps, node, residual=part.body.residual)
                else:
                    node = builder.steps([part], node)
        except UnsupportedError:
            return None
        builder.output(node, RESULT)
        return builder

    def _calls(self) -> Call:
        calls = [part.prepare() for part in self.parts]

        def call(x: torch.Tensor) -> torch.Tensor:
            for each in calls:
                x = each(x)
            return x

        return call
