"""The calls that a model of timm makes of each op, read off the model itself.

`python benchmarks/shapes.py` writes them to benchmarks/calls, a file a model, which is what the suites read; a test
says when timm's models are no longer those.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mnv4_kernels.benchmark.case import default_size

FOLDER = Path(__file__).resolve().parent / "calls"
PREFIX = "mobilenetv4_"


@dataclass(frozen=True)
class CallShape:
    """One distinct call: of a convolution, or of attention, whose maps have `size` = (queries, keys)."""

    op: str
    channels: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    #: timm's class, "" for none
    act: str = ""
    #: of queries; 0: no attention
    heads: int = 0
    #: how often the model makes this call
    count: int = 1


def call_shapes(model: str) -> list[CallShape]:
    """Distinct calls of `model` at its default size, in order of appearance."""
    import timm

    size = default_size(model)
    with torch.device("meta"):
        network = timm.create_model(model).eval()
    seen: dict[CallShape, int] = {}
    acts = _activations(network)

    def note(shape: CallShape) -> None:
        seen[shape] = seen.get(shape, 0) + 1

    def record(conv: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        height, width = inputs[0].shape[2:]
        note(
            CallShape(
                _op(conv, names[conv]), conv.in_channels, conv.out_channels, (height, width), _two(conv.kernel_size),
                _two(conv.stride), _two(conv.padding), acts.get(conv, ""),
            )
        )  # fmt: skip

    class Attention(TorchFunctionMode):
        def __torch_function__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if func is F.scaled_dot_product_attention:
                query, key, value = args[:3]
                sizes = (query.shape[-2], key.shape[-2])
                note(CallShape("mqa", query.shape[-1], value.shape[-1], sizes, heads=query.shape[1]))
            return func(*args, **(kwargs or {}))

    names = {module: name for name, module in network.named_modules()}
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad(), Attention():
        network(torch.empty((1, 3, size, size), device="meta"))
    return [dataclasses.replace(shape, count=count) for shape, count in seen.items()]


def _op(conv: nn.Conv2d, name: str) -> str:
    if name.endswith("down_conv"):
        return "kv_downsample"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "dwconv_bn_act"
    return "pwconv_bn_act" if conv.kernel_size == (1, 1) and conv.stride == (1, 1) else "conv_bn_act"


def _activations(network: nn.Module) -> dict[nn.Module, str]:
    """A convolution's activation: that of the normalisation which follows it among its parent's children."""
    found: dict[nn.Module, str] = {}
    for parent in network.modules():
        waiting: nn.Module | None = None
        for child in parent.children():
            act = getattr(child, "act", None)
            if isinstance(child, nn.Conv2d):
                waiting = child
            elif waiting is not None and isinstance(act, nn.Module):
                found[waiting] = "" if isinstance(act, nn.Identity) else type(act).__name__
                waiting = None
    return found


def _two(pair: object) -> tuple[int, int]:
    assert isinstance(pair, tuple)
    first, second = pair
    return int(first), int(second)


def to_rows(shapes: list[CallShape]) -> Iterator[list[str]]:
    """A head and a row a call; pairs are written `3x3`."""
    yield [field.name for field in dataclasses.fields(CallShape)]
    for shape in shapes:
        values = dataclasses.astuple(shape)
        yield ["x".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values]


def file_of(model: str) -> Path:
    """Where `model`'s calls are kept."""
    return FOLDER / f"{model.removeprefix(PREFIX)}.csv"


def kept_calls(model: str) -> list[CallShape]:
    """The calls in `model`'s file; timm is not asked.

    Raises:
        ValueError: there is no such file.
    """
    path = file_of(model)
    if not path.exists():
        names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.csv")))
        raise ValueError(f"`model` must be one of {names}, got {model!r}")
    with path.open() as file:
        next(file)
        return [_from_row(row) for row in csv.DictReader(file)]


def _from_row(row: dict[str, str]) -> CallShape:
    values: dict[str, Any] = {
        name: value if name in ("op", "act") else _pair(value) if "x" in value else int(value)
        for name, value in row.items()
    }
    return CallShape(**values)


def _pair(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second


def main() -> None:
    """Writes all models' files; the first line tells timm's version and the image's side."""
    import timm

    FOLDER.mkdir(exist_ok=True)
    for model in timm.list_models(f"{PREFIX}*"):
        with file_of(model).open("w", newline="") as file:
            file.write(f"# timm {timm.__version__}, {default_size(model)}px\n")
            csv.writer(file, lineterminator="\n").writerows(to_rows(call_shapes(model)))


if __name__ == "__main__":
    main()
