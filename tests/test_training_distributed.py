"""A patched model trains on several processes as on one, by torch's own distributed package."""

from __future__ import annotations

import copy

import processes as jobs
import pytest
import torch
from models import double_of, images
from timm.layers import convert_sync_batchnorm
from torch import nn
from training_models import loss_of, smooth

import mnv4_kernels as mk
from mnv4_kernels.backends import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons())),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, jobs.Gradients]]:
    """Every job's gradients in each process; starting a process takes longer than what it does."""
    folder = tmp_path_factory.mktemp("processes")
    torch.save(images(8, 3, 64, 64), folder / "images.pt")
    return jobs.in_processes(folder)


def of_parts(model: nn.Module, parts: int, share: float) -> dict[str, torch.Tensor]:
    """Gradients of eager over the batch in so many parts, each weighing `share`."""
    dtype = next(model.parameters()).dtype
    for part in images(8, 3, 64, 64).to(dtype).chunk(parts):
        (share * loss_of(model(part))).backward()
    return jobs.gradients(model)


def assert_as_exact_as_eager(found: list[jobs.Gradients], model: nn.Module, parts: int, share: float) -> None:
    """The gradients are the same in every process, and as near to float64 as eager's in one process."""
    exact = of_parts(double_of(model), parts, share)
    eager = of_parts(copy.deepcopy(model), parts, share)
    largest = max(value.norm().item() for value in exact.values())
    assert found[0].keys() == exact.keys()
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    for name, true in exact.items():
        error, earned = ((values[name].double() - true).norm().item() for values in (found[0], eager))
        band = 64 * torch.finfo(torch.float32).eps * max(true.norm().item(), 1e-4 * largest)
        assert error <= 2 * (earned + band), f"{name}: error {error:.3g}, eager's {earned:.3g}, band {band:.3g}"


# each process averages over processes what it would compute alone
def test_data_parallelism_gives_the_gradients_of_the_joined_batch(found: list[dict[str, jobs.Gradients]]) -> None:
    assert_as_exact_as_eager([each["parallel"] for each in found], jobs.frozen(), 2, 0.5)


def test_each_process_normalises_by_its_own_batch(found: list[dict[str, jobs.Gradients]]) -> None:
    """As DistributedDataParallel leaves it: what one process computes for each part, averaged."""
    model = smooth()
    mk.patch(model)
    alone = of_parts(model, 2, 0.5)
    for each in found:
        for name, value in each["parallel_with_batch_statistics"].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-6 * alone[name].norm().item())


def test_accumulation_without_communication_and_checkpointing(found: list[dict[str, jobs.Gradients]]) -> None:
    assert_as_exact_as_eager([each["parallel_accumulated"] for each in found], jobs.frozen(), 4, 0.5)


def test_fully_sharded_parameters(found: list[dict[str, jobs.Gradients]]) -> None:
    assert_as_exact_as_eager([each["sharded"] for each in found], jobs.frozen(), 2, 0.5)


def test_synchronised_statistics_are_torchs_before_and_after_patching(found: list[dict[str, jobs.Gradients]]) -> None:
    """On CPUs torch refuses them, patched or not; the process's own test says so of each order and of the report."""
    assert all("synchronised" in each for each in found)


@pytest.mark.filterwarnings("ignore:mnv4_kernels.patch. nothing to replace")
@pytest.mark.parametrize("patched_first", [True, False])
def test_converted_statistics_in_one_process_are_the_batchs(patched_first: bool) -> None:
    model = smooth()
    if patched_first:
        mk.patch(model)
    # timm's, which keeps the activations of its norms
    model = convert_sync_batchnorm(model)
    if not patched_first:
        mk.patch(model)
    assert_as_exact_as_eager([of_parts(model, 1, 1.0)], smooth(), 1, 1.0)
