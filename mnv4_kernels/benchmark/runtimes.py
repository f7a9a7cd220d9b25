"""Who competes: each runtime's name, what it needs, and how it is built from a model of timm.

A builder gets its own copy of the model (eval mode, float32), the input [N, 3, H, W]
float32 NCHW and the dtype to compute in, and returns a function without arguments that
runs the network once.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..backends import native

Run = Callable[[], torch.Tensor]
Builder = Callable[[nn.Module, torch.Tensor, torch.dtype], Run]


@dataclass(frozen=True)
class Runtime:
    """One row of the list."""

    name: str
    build: Builder
    #: modules it imports beyond torch and timm
    needs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    #: made by this project
    ours: bool = False

    def missing(self, dtype: torch.dtype) -> list[str]:
        """Why it can't run here in `dtype`, in words; empty if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        reasons = [f"{', '.join(absent)} not installed"] if absent else []
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


def _export_onnx(model: nn.Module, x: torch.Tensor, folder: str) -> str:
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


def _onnxruntime(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = _export_onnx(model, x, folder)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import openvino

    core = openvino.Core()
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(_export_onnx(model, x, folder)), "CPU", hints)
    request, array = compiled.create_infer_request(), x.numpy()

    def run() -> torch.Tensor:
        request.infer([array], share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _patched(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import mnv4_kernels

    model, x = model.to(dtype), x.to(dtype)
    mnv4_kernels.patch(model)
    return lambda: model(x)


def _optimized(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Run:
    import mnv4_kernels

    fast, x = mnv4_kernels.optimize(model, dtype), x.to(dtype)
    return lambda: fast(x)


_ONNX = ("onnx", "onnxscript")

#: In the order of the table; the first is what speed-ups refer to.
RUNTIMES = (
    Runtime("eager", _eager),
    Runtime("eager channels_last", _channels_last),
    Runtime("torch.compile", _compile),
    Runtime("torch.compile freezing", _compile_freezing),
    Runtime("onnxruntime", _onnxruntime, (*_ONNX, "onnxruntime"), (torch.float32,)),
    Runtime("openvino", _openvino, (*_ONNX, "openvino"), (torch.float32, torch.bfloat16)),
    Runtime("ours patched", _patched, ours=True),
    Runtime("ours optimized", _optimized, ours=True),
)


def select(names: list[str] | None) -> list[Runtime]:
    """The runtimes of these names, all for None; raises `ValueError` on an unknown one."""
    if names is None:
        return list(RUNTIMES)
    known = {runtime.name: runtime for runtime in RUNTIMES}
    for name in names:
        if name not in known:
            raise ValueError(f"`runtimes` must be among {', '.join(known)}, got {name!r}")
    return [known[name] for name in names]
