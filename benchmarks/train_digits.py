"""Trains a model on scikit-learn's digits from the same seed by eager and patched: loss curves and accuracy.

    python benchmarks/train_digits.py --models conv_small hybrid_medium --steps 100

What rounding alone does to a loss curve is seen beside it: eager in its two memory formats. `--json FILE` keeps
everything, curves included, and goes on with what the file does not have yet.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import mnv4_kernels
from mnv4_kernels import tables
from mnv4_kernels.benchmark.case import DTYPES
from mnv4_kernels.benchmark.report import provenance

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


def created(name: str, path: str, seed: int = 0) -> nn.Module:
    """timm's model for ten classes, the same for every path."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, num_classes=10)
    if path == "eager channels_last":
        model = model.to(memory_format=torch.channels_last)
    if path == "patched":
        mnv4_kernels.patch(model)
    return model


def train(
    model: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> list[float]:
    """The loss of each step; below float32 the forward runs under autocast."""
    generator = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 2)
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


def run(
    data: Digits, name: str, optimizer: str, dtype: str, steps: int, batch: int, seed: int
) -> dict[str, dict[str, Any]]:
    """{path: its losses and final accuracy}."""
    found = {}
    for path in PATHS:
        model = created(f"mobilenetv4_{name}", path, seed)
        chosen = OPTIMIZERS[optimizer](model.parameters())
        losses = train(model, data, chosen, steps, batch, DTYPES[dtype], seed)
        found[path] = {"losses": [round(loss, 6) for loss in losses], "accuracy": round(accuracy(model, data), 4)}
    return found


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    """First and last losses, the distance from eager's curve, and the accuracy of each path."""
    eager = found["eager"]["losses"]
    rows = []
    for path, values in found.items():
        losses = values["losses"]
        last = sum(losses[-10:]) / len(losses[-10:])
        difference = apart(losses, eager)
        rows.append([path, f"{losses[0]:.4f}", f"{last:.4f}", f"{difference:.1e}", f"{values['accuracy']:.1%}"])
    return tables.render(title, ["path", "first loss", "last ten", "from eager", "accuracy"], rows)


def main() -> int:
    """Trains in every way; a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["conv_small", "hybrid_medium"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches, a run each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where everything is kept")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = digits(arguments.size)
    command = shlex.join(["python", "benchmarks/train_digits.py", *sys.argv[1:]])
    kept: dict[str, Any] = {"provenance": {**provenance(), "command": command}, "results": {}}
    if arguments.json and arguments.json.is_file():
        kept["results"] = json.loads(arguments.json.read_text())["results"]
    for name, optimizer, dtype, seed in product(
        arguments.models, arguments.optimizers, arguments.dtypes, arguments.seeds
    ):
        shape = f"{arguments.steps} steps of {arguments.batch} at {arguments.size}px"
        title = f"{name} {optimizer} {dtype}, {shape}" + (f", seed {seed}" if seed else "")
        if title not in kept["results"]:
            kept["results"][title] = run(data, name, optimizer, dtype, arguments.steps, arguments.batch, seed)
            if arguments.json:
                arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"\n{table(title, kept['results'][title])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
