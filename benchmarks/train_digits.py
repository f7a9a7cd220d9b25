"""Trains a model on scikit-learn's digits from the same seed by eager and patched: loss curves and accuracy.

    python benchmarks/train_digits.py --models conv_small hybrid_medium --steps 100

What rounding alone does to a loss curve is seen beside it: eager in its two memory formats.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import mnv4_kernels
from mnv4_kernels import tables
from mnv4_kernels.benchmark.case import DTYPES

PATHS = ("eager", "eager channels_last", "patched")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@dataclass(frozen=True)
class Digits:
    """Images [N, 3, size, size] and labels [N]; every fifth is for the test."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def digits(size: int) -> Digits:
    """1797 handwritten digits of 8 x 8 pixels, enlarged."""
    loaded = load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(pixels, (size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(loaded.target)
    held = torch.arange(len(labels)) % 5 == 0
    return Digits(images[~held], labels[~held], images[held], labels[held])


def created(name: str, path: str) -> nn.Module:
    """timm's model for ten classes, the same for every path."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10)
    if path == "eager channels_last":
        model = model.to(memory_format=torch.channels_last)
    if path == "patched":
        mnv4_kernels.patch(model)
    return model


def train(
    model: nn.Module, data: Digits, optimizer: torch.optim.Optimizer, steps: int, batch: int, dtype: torch.dtype
) -> list[float]:
    """The loss of each step; below float32 the forward runs under autocast."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = []
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (batch,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32):
            logits = model(data.images[chosen])
        loss = F.cross_entropy(logits.float(), data.labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test's digits that the model, in eval mode and float32, tells."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in data.test_images.split(64)])
    return (found == data.test_labels).float().mean().item()


def apart(losses: list[float], others: list[float]) -> float:
    """Mean difference of two loss curves."""
    return sum(abs(mine - other) for mine, other in zip(losses, others, strict=True)) / len(losses)


def main() -> int:
    """Trains in every way; a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["conv_small", "hybrid_medium"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    data = digits(arguments.size)
    for name in arguments.models:
        for optimizer in arguments.optimizers:
            for dtype in arguments.dtypes:
                curves: dict[str, list[float]] = {}
                rows = []
                for path in PATHS:
                    model = created(f"mobilenetv4_{name}", path)
                    chosen = OPTIMIZERS[optimizer](model.parameters())
                    curves[path] = train(model, data, chosen, arguments.steps, arguments.batch, DTYPES[dtype])
                    losses = curves[path]
                    last = sum(losses[-10:]) / len(losses[-10:])
                    difference = apart(losses, curves["eager"])
                    first = f"{losses[0]:.4f}"
                    rows.append([path, first, f"{last:.4f}", f"{difference:.1e}", f"{accuracy(model, data):.1%}"])
                head = ["path", "first loss", "last ten", "from eager", "accuracy"]
                title = (
                    f"{name} {optimizer} {dtype}, {arguments.steps} steps of {arguments.batch} at {arguments.size}px"
                )
                print(f"\n{tables.render(title, head, rows)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
