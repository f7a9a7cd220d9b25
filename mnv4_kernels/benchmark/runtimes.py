"""Who competes: each runtime's name, what it needs, and how it runs a model of timm.

A torch runtime's builder gets its own copy of the model (eval mode, float32), the input
[N, 3, H, W] float32 NCHW and the dtype to compute in, and returns a function without
arguments that runs the network once. The others read a file that a converter has made of
torch.export's program; `foreign.player` knows how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..backends import native
from . import environments
from .environments import Environment
from .training_step import Forward

Run = Callable[[], torch.Tensor]
Builder = Callable[[nn.Module, torch.Tensor, torch.dtype], Run]
#: a model in train mode, its images -> (the model that is trained, what runs as its forward, the images)
Trainer = Callable[[nn.Module, torch.Tensor], tuple[nn.Module, Forward, torch.Tensor]]


@dataclass(frozen=True)
class Foreign:
    """A runtime that reads a file."""

    file: str
    #: where `foreign.converter` can write it
    converter: Environment
    #: where `foreign.player` can run it, and that one's name for the runtime
    player: Environment


@dataclass(frozen=True)
class Runtime:
    """One row of the list."""

    name: str
    how: Builder | Foreign
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: made by this project
    ours: bool = False
    #: modules that a torch runtime brings along, imported before its memory is counted
    imports: tuple[str, ...] = ("timm",)
    #: how it trains; None: it does not
    trainer: Trainer | None = None

    def missing(self, dtype: torch.dtype, folder: Path = environments.FOLDER) -> list[str]:
        """Why it can't run here in `dtype`, with environments in `folder`, in words; empty if it can."""
        reasons: list[str] = []
        if isinstance(self.how, Foreign):
            for environment in dict.fromkeys((self.how.player, self.how.converter)):
                reasons += environment.missing(folder)
        if dtype not in self.dtypes:
            reasons.append(f"no {str(dtype).removeprefix('torch.')} on the CPU")
        if self.name == "ours optimized":
            reasons += native.reasons()
        return reasons


def _eager(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    model, x = model.to(dtype), x.to(dtype)
    return lambda: model(x)


def _channels_last(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    model = model.to(dtype).to(memory_format=torch.channels_last)
    x = x.to(dtype=dtype, memory_format=torch.channels_last)
    return lambda: model(x)


def _compile(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    compiled, x = torch.compile(model.to(dtype)), x.to(dtype)
    return lambda: compiled(x)


def _compile_freezing(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import torch._inductor.config as inductor

    inductor.freezing = True
    return _compile(model, x, dtype)


def _patched(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import mnv4_kernels

    model, x = model.to(dtype), x.to(dtype)
    mnv4_kernels.patch(model)
    return lambda: model(x)


def _patched_compile(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import mnv4_kernels

    mnv4_kernels.patch(model.to(dtype))
    return _compile(model, x, dtype)


def _backend(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    from ..compiler import backend

    compiled, x = torch.compile(model.to(dtype), backend=backend), x.to(dtype)
    return lambda: compiled(x)


def _optimized(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import mnv4_kernels

    fast, x = mnv4_kernels.optimize(model, dtype), x.to(dtype)
    return lambda: fast(x)


def _train(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Forward, torch.Tensor]:
    return model, model, x


def _train_channels_last(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Forward, torch.Tensor]:
    model = model.to(memory_format=torch.channels_last)
    return model, model, x.contiguous(memory_format=torch.channels_last)


def _train_compiled(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Forward, torch.Tensor]:
    return model, torch.compile(model), x


def _train_patched(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Forward, torch.Tensor]:
    import mnv4_kernels

    mnv4_kernels.patch(model)
    return model, model, x


def _train_patched_compile(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Forward, torch.Tensor]:
    import mnv4_kernels

    mnv4_kernels.patch(model)
    return model, torch.compile(model), x


_F32 = (torch.float32,)
_INDUCTOR = ("timm", "torch._inductor.compile_fx")

#: In the order of the table; the first is what speed-ups refer to.
RUNTIMES = (
    Runtime("eager", _eager, trainer=_train),
    Runtime("eager channels_last", _channels_last, trainer=_train_channels_last),
    Runtime("torch.compile", _compile, imports=_INDUCTOR, trainer=_train_compiled),
    Runtime("torch.compile freezing", _compile_freezing, imports=_INDUCTOR),
    Runtime("onnxruntime", Foreign("model.onnx", environments.ONNX, environments.ONNXRUNTIME), _F32),
    Runtime("openvino", Foreign("model.onnx", environments.ONNX, environments.OPENVINO), (*_F32, torch.bfloat16)),
    Runtime("xnnpack", Foreign("model.pte", environments.EXECUTORCH, environments.EXECUTORCH), _F32),
    Runtime("litert", Foreign("model.tflite", environments.LITERT, environments.LITERT), _F32),
    Runtime("ours patched", _patched, ours=True, trainer=_train_patched),
    Runtime("ours patched, compiled", _patched_compile, ours=True, imports=_INDUCTOR, trainer=_train_patched_compile),
    Runtime("ours backend", _backend, ours=True, imports=_INDUCTOR),
    Runtime("ours optimized", _optimized, ours=True),
)


def select(names: list[str] | None, train: bool = False) -> list[Runtime]:
    """The runtimes of these names (that train), all for None; raises `ValueError` on an unknown one."""
    candidates = [runtime for runtime in RUNTIMES if runtime.trainer is not None or not train]
    if names is None:
        return candidates
    known = {runtime.name: runtime for runtime in candidates}
    for name in names:
        if name not in known:
            raise ValueError(f"`runtimes` must be among {', '.join(known)}, got {name!r}")
    return [known[name] for name in names]
