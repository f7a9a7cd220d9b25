"""`optimize` on a GPU: a patched copy with the gate's plans, replayed as CUDA graphs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..backends import cuda
from ..backends.torch_internals import opaque_to_graphs
from ..modules.dropin import DropIn
from ..modules.network import HEAD, STEM
from ..modules.program import FEATURES
from .graphs import CudaRecorder, GraphCache, Recorder
from .network import OptimizedNetwork, OptimizeError

#: Kinds of input (shape, memory format) whose graphs a network keeps.
GRAPHS = 8


class GraphedNetwork(OptimizedNetwork):
    """An optimized network on a GPU.

    A kind of input that is new to it (another shape or memory format) is run a few times and recorded, which takes
    as long as Triton's compilation; then it is replayed. Any thread and any stream may call it, they take
    turns; a copy (`copy.deepcopy`) takes turns with nobody. Copies and pickles record anew.

    Args:
        model: patched, in eval mode, on one CUDA device; nobody else's.
        dtype: of its convolutions.
        taps: whether it returns a list of maps (features_only).
        fallbacks: (module name, reason) of each piece that runs by timm's own code.
    """

    _model: Any

    def __init__(self, model: Any, dtype: torch.dtype, taps: bool, fallbacks: list[tuple[str, str]]) -> None:
        super().__init__(model.conv_stem.in_channels, [], taps, not taps, fallbacks)
        self.dtype = dtype
        # no submodule: its parameters are folded into the graphs, and moving them would move nothing
        self.__dict__["_model"] = model
        self._start()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        found: torch.device = self._model.conv_stem.weight.device
        return found

    @property
    def graphs(self) -> int:
        """How many kinds of input are recorded now."""
        return len(self._graphs)

    def _start(self) -> None:
        recorder = self._recorder()
        self._graphs = GraphCache(recorder, GRAPHS)
        # weights and buffers go to whoever allocates next: not while a replay on another stream reads them
        weakref.finalize(self, recorder.wait).atexit = False

    def _recorder(self) -> Recorder:
        if self.device.type != "cuda":
            raise OptimizeError(f"a network that was optimized for a GPU can't run on {self.device}: optimize it there")
        return CudaRecorder(self.device)

    # locks and graphs are nothing that it could trace, and a replay nothing that it could make faster
    @opaque_to_graphs
    def _run(self, x: torch.Tensor, tag: int) -> list[torch.Tensor]:
        self._check(x)
        run = self._features if tag == FEATURES else self._results
        # it has a dtype of its own, and a recording under autocast would answer calls outside of it
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if x.numel() == 0:
                return run(x.to(self.dtype))
            return self._graphs.call(tag, run, x, self.dtype)

    def _results(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self._model(x)
        return list(y) if self.taps else [y]

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self._model.forward_features(x)]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


def optimize_for_gpu(model: nn.Module, dtype: torch.dtype, strict: bool) -> GraphedNetwork:
    """`optimize` of a model whose parameters are on a GPU."""
    if reasons := cuda.reasons():
        raise OptimizeError(f"no Triton kernel can run here: {'; '.join(reasons)}")
    from ..patching.instances import apply

    if getattr(model, "feature_hooks", None) is not None:
        raise OptimizeError("feature hooks inside blocks (feature_location='expansion') have no graph")
    work: Any = copy.deepcopy(model).requires_grad_(False)
    for module in work.modules():
        # statistics stay as exact as they are: they are folded in float64
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    apply(work)
    if not isinstance(work, DropIn) or not hasattr(work, "blocks"):
        raise OptimizeError(f"`model` must be timm's MobileNetV3 or MobileNetV3Features, got {type(model).__name__}")
    fallbacks = list(_fallbacks(work))
    if strict and fallbacks:
        name, reason = fallbacks[0]
        raise OptimizeError(f"`{name}` has no kernel: {reason}")
    return GraphedNetwork(work, dtype, bool(getattr(work, "_stage_out_idx", None)), fallbacks)


def _fallbacks(model: Any) -> Iterator[tuple[str, str]]:
    """(name, reason) of what runs by timm's own code in `model`, patched."""
    yield from _of_piece("stem", model, STEM)
    for index, stage in enumerate(model.blocks):
        for number, block in enumerate(stage):
            name = f"blocks.{index}.{number}"
            if isinstance(block, DropIn):
                yield from _of_piece(name, block, "")
            else:
                yield name, f"{type(block).__name__} is no block that the kernels know"
    if hasattr(model, "classifier"):
        yield from _of_piece("head", model, HEAD)


def _of_piece(name: str, owner: DropIn, key: str) -> Iterator[tuple[str, str]]:
    plan = owner._mnv4_plan(key)
    if plan.obstacle:
        yield name, plan.obstacle
        return
    for step in plan.body.own:
        yield f"{name}.{step.name}", step.reason
