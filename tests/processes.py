"""What each of two processes does in the tests of training on several; importable, since they are spawned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from models import SMALL, ops_called
from torch import distributed, nn
from training_models import loss_of, norms_of, smooth

import mnv4_kernels as mk
from mnv4_kernels.environment import TRAINING_OPS

PROCESSES = 2

Gradients = dict[str, torch.Tensor]


def in_processes(folder: Path) -> list[dict[str, Gradients]]:
    """What each of `JOBS` returns in each of the processes, which are one gloo group."""
    torch.multiprocessing.spawn(_run, (folder,), PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def _run(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    try:
        torch.save({job.__name__: job(folder) for job in JOBS}, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def batch(folder: Path) -> torch.Tensor:
    """The images of this process."""
    images: torch.Tensor = torch.load(folder / "images.pt", weights_only=True)
    return images.chunk(PROCESSES)[distributed.get_rank()]


def gradients(model: nn.Module) -> Gradients:
    """Of every parameter, by its name in the bare model."""
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def frozen(name: str = SMALL) -> nn.Module:
    """A model whose BatchNorms use their running statistics: nothing but the loss joins the images of a batch."""
    model = smooth(name)
    for norm in norms_of(model):
        norm.eval()
    return model


def parallel(folder: Path) -> Gradients:
    """Gradients of DistributedDataParallel over frozen BatchNorms."""
    model = nn.parallel.DistributedDataParallel(_patched(frozen()))
    loss_of(model(batch(folder))).backward()
    return gradients(model)


def parallel_with_batch_statistics(folder: Path) -> Gradients:
    """Gradients of DistributedDataParallel where each process has statistics of its own."""
    model = nn.parallel.DistributedDataParallel(_patched(smooth()))
    loss_of(model(batch(folder))).backward()
    return gradients(model)


def parallel_accumulated(folder: Path) -> Gradients:
    """The same of two halves, the first without communication, with checkpointing and a static graph."""
    bare = _patched(frozen())
    bare.set_grad_checkpointing()
    model = nn.parallel.DistributedDataParallel(bare)
    first, second = batch(folder).chunk(2)
    with model.no_sync():
        loss_of(model(first)).backward()
    loss_of(model(second)).backward()
    return gradients(model)


def sharded(folder: Path) -> Gradients:
    """Gradients of a second step of fully sharded data parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = _patched(frozen())
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for stage in model.blocks:
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert set(TRAINING_OPS) & set(ops_called(lambda: model(batch(folder))))
    for _ in range(2):
        model.zero_grad()
        loss_of(model(batch(folder))).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    _unpatched_and_patched_again(model)
    return found


def synchronised(folder: Path) -> Gradients:
    """What torch says of synchronised statistics on CPUs: unpatched, converted before patching, and after it."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted_first = convert(smooth())
    reasons = [reason for row in mk.patch(converted_first).rows for _, reason in row.kept]
    assert "the statistics of SyncBatchNorm are of all processes: the ops have those of one" in reasons
    said = []
    for model in (convert(smooth()), converted_first, convert(_patched(smooth()))):
        try:
            model(batch(folder))
        except ValueError as error:
            said.append(str(error))
    # all three in torch's words
    assert len(said) == 3
    assert len(set(said)) == 1
    assert said[0].startswith("SyncBatchNorm expected input tensor to be on GPU")
    return {}


def _unpatched_and_patched_again(model: Any) -> None:
    """What `unpatch` leaves of a sharded model, and what `patch` says to one."""
    from torch.distributed.fsdp import FSDPModule

    block = model.blocks[2][0]
    mk.unpatch(model)
    assert isinstance(block, FSDPModule)
    assert type(block).__name__ == "FSDPUniversalInvertedResidual"
    assert type(block) is type(model.blocks[2][1])
    block.reshard()
    (row,) = [row for row in mk.patch(model).left_alone if row.name == "blocks.2.0"]
    assert row.reason == "it was sharded first: call mnv4_kernels.patch before fully_shard"


def _patched(model: nn.Module) -> Any:
    mk.patch(model)
    return model


JOBS = (parallel, parallel_with_batch_statistics, parallel_accumulated, sharded, synchronised)
