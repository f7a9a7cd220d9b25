"""The campaign's training stages: depthwise kernels beside the copy's rate, whole steps beside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_training import training_calls
from gpu_work import Rows, Work, model_of, timed
from torch.nn import functional as F

import mnv4_kernels
from mnv4_kernels.ops.support import dtype_name

#: how a step is run; what compiles longest comes last
WAYS = ("channels_last", "patched", "torch.compile")


def training_kernels(work: Work) -> Rows:
    """Every depthwise shape of a step, forward and backward: the share of the copy's bandwidth that it reaches."""
    for key, call, _ in work.calls(training_calls):
        if call.op.startswith("bn_act_dwconv"):
            yield key, lambda call=call: timed(work, call, eager=False)


def steps(work: Work) -> Rows:
    """Forward under autocast, cross entropy, backward and SGD: time, peak memory, and losses to compare."""
    for name, batch, dtype in work.cases():
        for way in WAYS:
            key = f"{name}/b{batch}/{dtype_name(dtype)}/{way}"
            yield key, lambda n=name, b=batch, d=dtype, w=way: _row(work, n, b, d, w)


def _row(work: Work, name: str, batch: int, dtype: torch.dtype, way: str) -> dict[str, Any]:
    net, x = model_of(work, name, batch, torch.float32)
    net.train()
    forward = net
    if way == "patched":
        mnv4_kernels.patch(net)
    elif way == "torch.compile":
        torch._dynamo.reset()
        forward = work.gpu.compile(net, mode=None)
    losses: list[float] = []
    step = _step(net, forward, x, dtype)
    with torch.enable_grad():
        # compiles; a step that goes wrong shows in the losses, which all ways must share but for roundings
        losses += [float(step()) for _ in range(3)]
        peak = work.gpu.peak_mib(step)
        timing = work.gpu.time(step, 20)
    if not all(loss == loss and loss < 100 for loss in losses):
        raise AssertionError(f"the losses of the first steps are {losses}")
    found = {**timing, "peak_mib": peak, "losses": losses, "images_s": round(batch / timing["median_us"] * 1e6)}
    del net, forward, step
    work.gpu.free()
    return found


def _step(net: torch.nn.Module, forward: Any, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    # so small that the weights stay where they are, however many steps are timed
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    labels = torch.arange(len(x), device=x.device) % 10
    low = dtype != torch.float32

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype if low else torch.bfloat16, enabled=low):
            logits = forward(x)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
