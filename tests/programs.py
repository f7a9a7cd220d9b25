"""Random programs of the engine, and what they mean in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from mnv4_kernels.backends import native
from mnv4_kernels.ops.activation import ACTIVATIONS

Shape = tuple[int, int, int]  # C, H, W

channels = st.sampled_from([1, 3, 8, 15, 16, 17, 24, 32, 40, 48])


class RandomProgram:
    """Nodes with their arrays; `run` is what an engine of the same rows must compute."""

    def __init__(self, shape: Shape, seed: int) -> None:
        #: of each node's result
        self.shapes = [shape]
        self.rows: list[dict[str, int]] = []
        self.arrays: list[torch.Tensor] = []
        self.seed = seed

    def __repr__(self) -> str:
        nodes = [
            {name: kinds()[value] if name == "kind" else value for name, value in row.items() if value not in (0, -1)}
            for row in self.rows
        ]
        return f"RandomProgram(input={self.shapes[0]}, seed={self.seed}, nodes={nodes})"

    def add(self, kind: str, source: int, shape: Shape, sizes: list[tuple[int, ...]], **values: int) -> None:
        """A node of `shape` with random arrays of `sizes`, scaled so that sums stay near one."""
        generator = torch.Generator().manual_seed(self.seed + len(self.rows))
        defaults = {"residual": -1, "stride_h": 1, "stride_w": 1, "dilation_h": 1, "dilation_w": 1}
        row = {
            **defaults,
            "kind": kinds().index(kind),
            "input": source,
            "weight": len(self.arrays),
            "channels": shape[0],
        }
        self.rows.append({**row, **values})
        for size in sizes:
            fan_in = max(1, int(torch.Size(size[1:]).numel()))
            self.arrays.append(torch.randn(size, generator=generator) / fan_in**0.5)
        if kind != "input":
            self.shapes.append(shape)

    def tensors(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What an engine is created from."""
        rows = [[row.get(name, 0) for name in native.module().engine_fields()] for row in self.rows]
        return torch.tensor(rows, dtype=torch.int64), self.arrays

    def run(self, x: torch.Tensor, tag: int) -> tuple[list[torch.Tensor], float]:
        """The outputs of `tag` in x's dtype, and the largest magnitude on the way."""
        values: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        for row in self.rows:
            kind = kinds()[row["kind"]]
            source = values[row["input"]] if values else x
            values.append(self._node(kind, row, source, values))
            if kind == "output" and row["channels"] == tag:
                outputs.append(values[-1])
        return outputs, max((value.abs().max().item() for value in values if value.numel()), default=0.0)

    def _node(self, kind: str, row: dict[str, int], x: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        if kind in ("input", "output"):
            return x
        if kind == "pool":
            return x.mean((2, 3))
        arrays = [array.to(x.dtype) for array in self.arrays[row["weight"] :]]
        if kind == "attention":
            y = _attention(row, x, arrays)
        elif kind == "linear":
            y = F.linear(x, arrays[0], arrays[1])
        elif kind == "pointwise":
            y = F.conv2d(x, arrays[0][:, :, None, None], arrays[1])
        else:
            y = _convolution(row, x, arrays[0], arrays[1])
        y = list(ACTIVATIONS.values())[row.get("act", 0)](y)
        return y if row["residual"] < 0 else y + values[row["residual"]]


def kinds() -> list[str]:
    """The node kinds by their codes."""
    return list(native.module().engine_kinds())


def _pair(row: dict[str, int], name: str) -> tuple[int, int]:
    return row[f"{name}_h"], row[f"{name}_w"]


def _convolution(row: dict[str, int], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mode = native.module().engine_pad_modes()[row.get("pad_mode", 0)]
    pads = [row.get(f"pad_{side}", 0) for side in ("left", "right", "top", "bottom")]
    if mode == "same":
        pads = [*_same(row, x, "w", 3), *_same(row, x, "h", 2)]
    padded = F.pad(x, pads, mode="reflect" if mode == "reflect" else "constant")
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(padded, weight, bias, _pair(row, "stride"), 0, _pair(row, "dilation"), groups)


def _same(row: dict[str, int], x: torch.Tensor, axis: str, dim: int) -> tuple[int, int]:
    size, stride = x.shape[dim], row[f"stride_{axis}"]
    reach = (-(-size // stride) - 1) * stride + (row[f"kernel_{axis}"] - 1) * row[f"dilation_{axis}"] + 1
    total = max(0, reach - size)
    return total // 2, total - total // 2


def _attention(row: dict[str, int], x: torch.Tensor, arrays: list[torch.Tensor]) -> torch.Tensor:
    scale, shift, query, query_bias, *rest = arrays
    heads, key_dim = row["heads"], row["key_dim"]

    def positions(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(y.flatten(2).transpose(1, 2), weight, bias)

    sides = []
    for down, down_shift, weight, bias in (rest[:4], rest[4:8]):
        y = x
        if down.numel():
            y = _convolution(row, x * scale[:, None, None] + shift[:, None, None], down, down_shift)
        sides.append(positions(y, weight, bias)[:, None])
    key, value = sides
    q = positions(x, query, query_bias).unflatten(-1, (heads, key_dim)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1))
    y = F.linear(mixed.transpose(1, 2).flatten(2), rest[8], rest[9])
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


@st.composite
def programs(draw: st.DrawFn) -> RandomProgram:
    """Up to eight nodes on any earlier map, residuals from any map of the right shape, outputs anywhere."""
    first = (draw(channels), draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    program = RandomProgram(first, draw(st.integers(0, 99)))
    program.add("input", -1, first, [])
    maps = [0]
    for _ in range(draw(st.integers(1, 8))):
        # mostly the newest map, as in a network
        source = maps[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(maps))
        _draw_node(draw, program, source, maps)
        maps.append(len(program.rows) - 1)
        if not draw(st.integers(0, 4)):
            _draw_output(draw, program, maps[-1])
    last = _draw_head(draw, program, maps[-1]) if draw(st.booleans()) else maps[-1]
    program.add("output", last, program.shapes[last], [], channels=0)
    return program


def _draw_output(draw: st.DrawFn, program: RandomProgram, source: int) -> None:
    program.add("output", source, program.shapes[source], [], channels=draw(st.integers(0, 1)))


def _draw_head(draw: st.DrawFn, program: RandomProgram, source: int) -> int:
    inputs = program.shapes[source][0]
    program.add("pool", source, (inputs, 1, 1), [])
    for _ in range(draw(st.integers(0, 2))):
        outputs = draw(st.sampled_from([1, 7, 16, 100]))
        act = draw(st.integers(0, len(ACTIVATIONS) - 1))
        program.add("linear", len(program.rows) - 1, (outputs, 1, 1), [(outputs, inputs), (outputs,)], act=act)
        inputs = outputs
    return len(program.rows) - 1


def _draw_node(draw: st.DrawFn, program: RandomProgram, source: int, maps: list[int]) -> None:
    c, h, w = program.shapes[source]
    kind = draw(st.sampled_from(["pointwise", "pointwise", "depthwise", "depthwise", "conv", "attention"]))
    outputs = draw(channels)
    act = draw(st.integers(0, len(ACTIVATIONS) - 1))
    if kind == "pointwise":
        values = {"act": act, "residual": _draw_residual(draw, program, maps, (outputs, h, w))}
        return program.add(kind, source, (outputs, h, w), [(outputs, c), (outputs,)], **values)
    geometry, size = _draw_geometry(draw, (h, w), kind == "depthwise")
    kernel = (geometry["kernel_h"], geometry["kernel_w"])
    if kind == "depthwise":
        return program.add(kind, source, (c, *size), [(c, 1, *kernel), (c,)], act=act, **geometry)
    if kind == "conv":
        return program.add(kind, source, (outputs, *size), [(outputs, c, *kernel), (outputs,)], act=act, **geometry)
    return _draw_attention(draw, program, source, maps, geometry)


def _draw_residual(draw: st.DrawFn, program: RandomProgram, maps: list[int], shape: Shape) -> int:
    same = [index for index in maps if program.shapes[index] == shape]
    return draw(st.sampled_from([-1, *same]))


def _draw_attention(
    draw: st.DrawFn, program: RandomProgram, source: int, maps: list[int], geometry: dict[str, int]
) -> None:
    shape = c, h, w = program.shapes[source]
    heads, key_dim, value_dim = draw(st.integers(1, 4)), draw(channels), draw(channels)
    down: tuple[int, ...] = (0,)
    if draw(st.booleans()):
        down = (c, 1, geometry["kernel_h"], geometry["kernel_w"])
    else:
        geometry = {}
    sizes: list[tuple[int, ...]] = [(c,), (c,), (heads * key_dim, c), (heads * key_dim,)]
    for dim in (key_dim, value_dim):
        sizes += [down, (c,), (dim, c), (dim,)]
    sizes += [(c, heads * value_dim), (c,)]
    residual = _draw_residual(draw, program, maps, (c, h, w))
    dims = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    program.add("attention", source, shape, sizes, residual=residual, **dims, **geometry)


def _draw_geometry(draw: st.DrawFn, size: tuple[int, int], reflect: bool) -> tuple[dict[str, int], tuple[int, int]]:
    modes = list(native.module().engine_pad_modes())
    mode = draw(st.sampled_from(["explicit", "explicit", "same", *(["reflect"] if reflect else [])]))
    square = draw(st.booleans())
    any_window = st.tuples(st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 2), st.sampled_from([1, 1, 1, 2]))
    # dense ones of 3 x 3 and stride 2 have an algorithm of their own
    common = draw(st.one_of(st.just((3, 2, 1)), any_window))
    values: dict[str, Any] = {"pad_mode": modes.index(mode)}
    results = []
    for axis, length, before, after in (("h", size[0], "top", "bottom"), ("w", size[1], "left", "right")):
        kernel, stride, dilation = common
        if not square:
            kernel, stride, dilation = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
        if mode == "reflect":
            # BlurPool2d's, which has no dilation
            dilation = 1
        reach = dilation * (kernel - 1) + 1
        pads = (reach // 2, reach // 2)
        if mode == "reflect":
            # a mirror shows no more than the image, and without its edge
            pads = (min(pads[0], length - 1), min(pads[1], length - 1))
        if mode == "explicit" and not square:
            pads = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
        if mode != "same" and length + sum(pads) < reach:
            kernel, reach = 1, 1
        values |= {f"kernel_{axis}": kernel, f"stride_{axis}": stride, f"dilation_{axis}": dilation}
        if mode == "same":
            results.append(-(-length // stride))
            continue
        values |= {f"pad_{before}": pads[0], f"pad_{after}": pads[1]}
        results.append((length + sum(pads) - reach) // stride + 1)
    return values, (results[0], results[1])
