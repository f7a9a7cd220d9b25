"""`optimize`: reads a timm model, folds it, and hands it to the engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..backends import native
from ..modules import leaves
from ..modules.dropin import DropIn
from ..modules.network import HEAD, STEM
from ..modules.program import FEATURES, RESULT, ProgramBuilder, UnsupportedError
from ..modules.steps import Own
from .gpu import optimize_for_gpu
from .network import DTYPES, OptimizedNetwork, OptimizeError, ProgramPart, TimmPart


def optimize(model: nn.Module, dtype: torch.dtype = torch.float32, *, strict: bool = False) -> OptimizedNetwork:
    """A new, inference-only module with `model`'s results: folded, packed, planned as a whole.

    `model` itself stays as it is, patched or not. Later changes of its parameters are not
    seen: optimise it again.

    Args:
        model: a timm MobileNet-V4 in eval mode, classifier or features_only, on the CPU or one CUDA device,
            where the result runs too: on a GPU by Triton kernels, replayed as CUDA graphs.
        dtype: float32, bfloat16 or float16: how weights (and, where the processor has the
            instructions, activations) are stored; sums are float32.
        strict: raise instead of running a piece by timm's own code.

    Raises:
        OptimizeError: the C++ library (on a GPU: Triton, or a device that it knows) is missing, the model
            is none that the engine knows, or `strict` and a piece would run by timm's own code; names the module.
        ValueError: another dtype; a model in train mode, or neither on the CPU nor on one CUDA device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("`model` must be in eval mode: call model.eval() first")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1 or any(device.type not in leaves.DEVICES for device in devices):
        raise ValueError(f"`model` must be on the CPU or one CUDA device, got {', '.join(sorted(map(str, devices)))}")
    if any(map(leaves.on_gpu, model.parameters())):
        return optimize_for_gpu(model, dtype, strict)
    if not native.available():
        raise OptimizeError("the engine needs the C++ library: " + "; ".join(native.reasons()))
    from ..patching.instances import apply

    # the copy is only read: tensors that need no conversion are not copied with it
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float32}
    work = copy.deepcopy(model, shared).float()
    apply(work)
    name = type(model).__name__
    if not isinstance(work, DropIn) or not hasattr(work, "blocks"):
        raise OptimizeError(f"`model` must be timm's MobileNetV3 or MobileNetV3Features, got {name}")
    with torch.no_grad():
        return _Assembly(work, dtype, strict).network()


class _Assembly:
    """Walks stem, blocks and head, and cuts programs where there is no node."""

    def __init__(self, model: Any, dtype: torch.dtype, strict: bool) -> None:
        self.model = model
        self.dtype = dtype
        self.strict = strict
        self.parts: list[nn.Module] = []
        self.fallbacks: list[tuple[str, str]] = []
        self.builder: ProgramBuilder | None = None
        self.names: list[str] = []
        self.node = 0
        self.channels = model.conv_stem.in_channels

    def network(self) -> OptimizedNetwork:
        model = self.model
        taps = set(model._stage_out_idx) if hasattr(model, "_stage_out_idx") else set()
        features_only = bool(taps)
        if getattr(model, "feature_hooks", None) is not None:
            raise OptimizeError("feature hooks inside blocks (feature_location='expansion') have no program")
        self._piece("stem", model, STEM)
        self._tap(0 in taps)
        for index, stage in enumerate(model.blocks, start=1):
            for number, block in enumerate(stage):
                self._piece(f"blocks.{index - 1}.{number}", block, "")
            self._tap(index in taps)
        if not features_only:
            self._head()
        self._close(final=True)
        return OptimizedNetwork(
            model.conv_stem.in_channels, self.parts, features_only, not features_only, self.fallbacks
        )

    def _program(self) -> ProgramBuilder:
        if self.builder is None:
            self.builder = ProgramBuilder(self.channels, self.dtype)
            self.names = []
            self.node = 0
        return self.builder

    def _piece(self, name: str, owner: nn.Module, key: str) -> None:
        try:
            if not isinstance(owner, DropIn):
                raise UnsupportedError(f"{type(owner).__name__} is no block that the engine knows")
            body = owner._mnv4_body(key)
            builder = self._program()
            self._name_nodes("")
            self.node = builder.steps(body.steps, self.node, residual=body.residual)
            self._name_nodes(name)
        except UnsupportedError as reason:
            self._fall_back(name, owner, str(reason))
        self.channels = _channels_after(owner, key, self.channels)

    def _fall_back(self, name: str, owner: nn.Module, reason: str) -> None:
        if self.strict or name in ("stem", "head"):
            raise OptimizeError(f"`{name}` has no place in a program: {reason}")
        self.fallbacks.append((name, reason))
        self._close(final=False)
        self.parts.append(TimmPart(owner, tap=False))

    def _name_nodes(self, name: str) -> None:
        """The nodes added since the last call are `name`'s."""
        if self.builder is not None:
            self.names += [name] * (len(self.builder.rows) - len(self.names))

    def _tap(self, wanted: bool) -> None:
        if not wanted:
            return
        if self.builder is None:
            part = self.parts[-1]
            assert isinstance(part, TimmPart)
            part.tap = True
        else:
            self.builder.output(self.node, RESULT)

    def _head(self) -> None:
        body = self.model._mnv4_body(HEAD)
        builder = self._program()
        builder.output(self.node, FEATURES)
        if any(isinstance(step, Own) for step in body.steps):
            reasons = "; ".join(dict.fromkeys(step.reason for step in body.steps if isinstance(step, Own)))
            raise OptimizeError(f"`head` has no place in a program: {reasons}")
        self._name_nodes("")
        self.node = builder.steps(body.steps, self.node, residual=body.residual)
        self._name_nodes("head")
        builder.output(self.node, RESULT)

    def _close(self, final: bool) -> None:
        if self.builder is None:
            return
        if not final and len(self.builder.rows) > 1:
            self.builder.output(self.node, RESULT)
        if len(self.builder.rows) > 1:
            self._name_nodes("")
            self.parts.append(ProgramPart(*self.builder.finish(), self.dtype == torch.bfloat16, self.names))
        self.builder = None


def _channels_after(owner: Any, key: str, channels: int) -> int:
    convs = [module for module in owner.modules() if isinstance(module, nn.Conv2d)]
    if key == STEM:
        return int(owner.conv_stem.out_channels)
    # the last convolution of a block gives its width, but for squeeze-and-excitation inside
    last = owner.pw_proj.conv if hasattr(owner, "pw_proj") else convs[-1]
    return int(last.out_channels)
