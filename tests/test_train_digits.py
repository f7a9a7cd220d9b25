"""N steps from the same seed train the same model: the loss curves of patched and eager, on real data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import train_digits as example

from mnv4_kernels.backends import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons())),
    pytest.mark.usefixtures("one_thread"),
]

SMALL = "mobilenetv4_conv_small_035"


def curves_of(name: str, optimizer: str, dtype: torch.dtype, steps: int) -> dict[str, list[float]]:
    data = example.digits(32)
    found = {}
    for path in example.PATHS:
        model = example.created(name, path)
        chosen = example.OPTIMIZERS[optimizer](model.parameters())
        found[path] = example.train(model, data, chosen, steps, 16, dtype)
    return found


@pytest.mark.parametrize("optimizer", list(example.OPTIMIZERS))
def test_ten_steps_follow_eagers_losses(optimizer: str) -> None:
    """As closely as eager's other memory format does."""
    curves = curves_of(SMALL, optimizer, torch.float32, 10)
    eager = curves["eager"]
    band = 1e-3 * max(eager)
    assert example.apart(curves["patched"], eager) <= 2 * (example.apart(curves["eager channels_last"], eager) + band)
    assert curves["patched"] != eager


def test_ten_steps_under_autocast_follow_eagers_losses() -> None:
    curves = curves_of(SMALL, "sgd", torch.bfloat16, 10)
    eager = curves["eager"]
    band = torch.finfo(torch.bfloat16).eps * max(eager)
    assert example.apart(curves["patched"], eager) <= 2 * (example.apart(curves["eager channels_last"], eager) + band)


def test_the_digits_are_split_without_overlap() -> None:
    data = example.digits(32)
    assert len(data.labels) + len(data.test_labels) == 1797
    assert data.images.shape[1:] == (3, 32, 32)
    assert set(data.test_labels.tolist()) == set(range(10))
