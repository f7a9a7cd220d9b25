"""What the campaign's stages share: their cases, models and timings."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_campaign import Results
from gpu_device import Gpu, MadeUp
from gpu_shapes import Block, Call, blocks, calls

from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.gpu.traffic import Ceilings
from mnv4_kernels.ops.support import dtype_name

#: (key, what makes its row)
Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


class Work:
    """What every stage needs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.gpu: Any = MadeUp() if arguments.dry_run else Gpu()
        self.results = Results(arguments.out / "campaign.json")
        self.deadline = arguments.until
        self.dtypes = [getattr(torch, name) for name in arguments.dtypes]

    def late(self) -> bool:
        """True once the time is up."""
        return time.monotonic() > self.deadline

    def cases(self) -> Iterator[tuple[str, int, torch.dtype]]:
        """(model, batch, dtype), the models in their order, then the batches."""
        for dtype in self.dtypes:
            for model in self.arguments.models:
                for batch in self.arguments.batches:
                    yield model, batch, dtype

    def calls(
        self, calls_of: Callable[[Block, torch.dtype, str], Iterator[Call]] = calls
    ) -> Iterator[tuple[str, Call, torch.dtype]]:
        """(key, call, dtype) of every distinct op call of the cases."""
        seen = set()
        for model, batch, dtype in self.cases():
            for block in blocks(model, batch, self.arguments.size):
                for call in calls_of(block, dtype, self.gpu.device):
                    key = f"{call.op}/{dtype_name(dtype)}/{signature(call)}"
                    if key not in seen:
                        seen.add(key)
                        yield key, call, dtype

    def copy_gb_s(self) -> float:
        """The ceiling that was measured, else the one that is assumed."""
        row = self.results.rows("ceilings").get("copy", {})
        return float(row.get("gb_s", Ceilings().copy_gb_s))


def signature(call: Call) -> str:
    """Shapes and settings of a call, short enough for a key."""
    parts = []
    for value in call.arguments:
        if torch.is_tensor(value):
            parts.append("x".join(map(str, value.shape)))
        elif value is None:
            parts.append("-")
        else:
            parts.append("".join(map(str, value)) if isinstance(value, list) else str(value))
    return ",".join(parts)


def least_bytes(call: Call, result: Any) -> int:
    """Arguments and results once."""
    tensors = [v for v in (*call.arguments, *(result if isinstance(result, tuple) else [result])) if torch.is_tensor(v)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def timed(work: Work, call: Call, eager: bool) -> dict[str, Any]:
    """A call's time beside the copy's rate, and eager's."""
    result, run, configs = work.gpu.call(call.op, call.arguments)
    # several launches take Python longer than the device
    timing = work.gpu.time(work.gpu.replay(run))
    moved = least_bytes(call, result)
    row = {
        **timing,
        "role": call.role,
        "least_bytes": moved,
        "gb_s": round(moved / max(timing["median_us"], 1e-3) / 1e3, 1),
        "of_copy": round(moved / max(timing["median_us"], 1e-3) / 1e3 / work.copy_gb_s(), 3),
        "configs": {name: str(config) for name, config in configs.items()},
    }
    if eager:
        row["eager"] = work.gpu.time(lambda: REFERENCES[call.op](*call.arguments), 10)
    work.gpu.free()
    return row


def model_of(work: Work, name: str, batch: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """(timm's model in channels_last, images in channels_last) on the device."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(f"mobilenetv4_{name}").eval().to(work.gpu.device)
    size = work.arguments.size or net.default_cfg["input_size"][-1]
    x = torch.randn(batch, 3, size, size, device=work.gpu.device, dtype=dtype)
    return net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
