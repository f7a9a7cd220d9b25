"""Every row of the kernels' lists, alone: tails, strides, epilogues, and not a byte beside what is its own.

Memory round every operand is NaN, and round every result a pattern that must survive. The
bound is the textbook one: a float32 sum of K products is off by at most about K units of
the sum of their magnitudes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from microkernels import EPS, LISTS, PANEL, Guarded, dtype_of, kernels, pack, random, rows_of
from torch.nn import functional as F

from mnv4_kernels.backends import native
from mnv4_kernels.ops.activation import ACTIVATIONS


class Tile:
    """A problem for one tile of a GEMM kernel, and its answer."""

    def __init__(
        self,
        kernel: dict[str, Any],
        rows: int,
        variant: int,
        segments: int = 1,
        length: int = 6,
        columns: int = PANEL,
        act: str = "none",
        gamma: bool = False,
        residual: bool = False,
        pair: bool = False,
    ) -> None:
        self.kernel, self.rows, self.variant, self.act, self.columns = kernel, rows, variant, act, columns
        self.pair = pair
        self.input, self.output = dtype_of(kernel["input"]), dtype_of(kernel["output"])
        self.panels = 2 if pair else 1
        self.n = (self.panels - 1) * PANEL + columns
        length = kernel["segment_length"][variant] or length
        self.segment_length = length
        # overlapping rows are what a strided image has: the same element may belong to several
        self.a_row = kernel["row_stride"][variant] if variant > kernels.any_row else segments * (length + 3) + 5
        # in an order that is not theirs in memory
        self.segments = [(length + 3) * index for index in reversed(range(segments))]
        at = torch.tensor(
            [[row * self.a_row + start + k for start in self.segments for k in range(length)] for row in range(rows)]
        )
        hull = random(int(at.max()) + 1, dtype=self.input, seed=rows)
        self.a = Guarded(hull.numel(), self.input)
        self.a.values[at] = hull[at]
        self.b = random(segments * length, self.panels * PANEL, dtype=self.input, seed=3)
        self.packed_b = Guarded.of(pack(self.b, self.input))
        self.bias, self.gamma, self.residual = (random(self.panels * PANEL, seed=4), None, None)
        if gamma:
            self.gamma = random(self.panels * PANEL, seed=5)
        self.c_row, self.residual_row = self.n + 3, self.n + 2
        if residual:
            self.residual = Guarded((rows - 1) * self.residual_row + self.n, self.output)
            block = self.residual.values.as_strided((rows, self.n), (self.residual_row, 1))
            block.copy_(random(rows, self.n, dtype=self.output, seed=6))
        self.at = at
        self.c = Guarded((rows - 1) * self.c_row + self.n, self.output)
        self.partial = Guarded(rows * self.panels * PANEL)

    def run(self, first: bool = True, last: bool = True, part: slice | None = None) -> None:
        """One call over the segments of `part`."""
        part = part or slice(None)
        start = len(self.segments[: part.start or 0]) * self.segment_length * PANEL * self.input.itemsize
        depth = len(self.segments) * self.segment_length
        numbers = {
            "a_row": self.a_row,
            "segment_length": self.segment_length,
            "b_panel": depth * PANEL,
            "residual_row": self.residual_row,
            "c_row": self.c_row,
            "c_panel": PANEL,
            "residual_panel": PANEL,
            "pair": int(self.pair),
            "columns": self.columns,
            "first": int(first),
            "last": int(last),
            "rows": self.rows,
            "variant": self.variant,
        }
        kernels.gemm_tile(
            self.kernel["listed_name"],
            numbers,
            self.segments[part],
            self.act,
            self.a.buffer,
            self.packed_b.buffer[start:],
            Guarded.of(self.bias).buffer,
            None if self.gamma is None else Guarded.of(self.gamma).buffer,
            None if self.residual is None else self.residual.buffer,
            self.c.buffer,
            self.partial.buffer,
        )

    def check(self) -> None:
        """c holds act(a b + bias) * gamma + residual, and nothing else was written."""
        a, b, bias = self.a.values.double()[self.at], self.b.double()[:, : self.n], self.bias.double()[: self.n]
        exact = ACTIVATIONS[self.act](a @ b + bias)
        # an activation's slope stays below 1.2; its own error is a few units
        bound = 1.2 * (b.shape[0] + 8) * EPS * (a.abs() @ b.abs() + bias.abs()) + 16 * EPS * exact.abs()
        if self.gamma is not None:
            gamma = self.gamma.double()[: self.n]
            exact, bound = exact * gamma, bound * gamma.abs()
        if self.residual is not None:
            exact = exact + self.residual.values.as_strided((self.rows, self.n), (self.residual_row, 1)).double()
        bound = bound + torch.finfo(self.output).eps * exact.abs() + EPS
        c = self.c.values.as_strided((self.rows, self.n), (self.c_row, 1))
        excess = (c.double() - exact).abs() - bound
        assert bool((excess <= 0).all()), f"{self.kernel['name']}: {excess.max().item():.3g} beyond the bound"
        mine = torch.zeros_like(self.c.values, dtype=torch.bool)
        mine.as_strided((self.rows, self.n), (self.c_row, 1)).fill_(True)
        assert torch.equal(self.c.written(), mine)


# a matrix unit's kernels have no register tiles: test_products.py runs whole products
gemm_rows = pytest.mark.parametrize("kernel", [row for row in rows_of("gemm") if not row.values[0]["matrix"]])


@gemm_rows
@pytest.mark.parametrize("variant", range(len(LISTS["gemm"][0]["row_stride"])))
def test_every_gemm_tile_of_every_height_and_stride(kernel: dict[str, Any], variant: int) -> None:
    for rows in range(1, kernel["max_rows"] + 1):
        for segments, length in ((1, 2), (1, 34), (3, 4), (5, 16)):
            tile = Tile(kernel, rows, variant, segments, length)
            tile.run()
            tile.check()


@gemm_rows
@pytest.mark.parametrize("columns", range(1, PANEL + 1))
def test_every_tail_of_columns(kernel: dict[str, Any], columns: int) -> None:
    for rows, variant, residual in itertools.product((1, kernel["max_rows"]), (0, 2), (False, True)):
        tile = Tile(kernel, rows, variant, columns=columns, residual=residual, gamma=residual)
        tile.run()
        tile.check()


@gemm_rows
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_epilogue(kernel: dict[str, Any], act: str) -> None:
    heights = {1, kernel["max_rows"] // 2, kernel["max_rows"]}
    for rows, gamma, residual in itertools.product(heights, (False, True), (False, True)):
        tile = Tile(kernel, rows, 0, segments=2, length=10, act=act, gamma=gamma, residual=residual)
        tile.run()
        tile.check()


paired = [row for row in rows_of("gemm") if row.values[0]["pair_rows"]]


@pytest.mark.parametrize("kernel", paired)
@pytest.mark.parametrize("variant", range(len(LISTS["gemm"][0]["row_stride"])))
def test_every_tile_of_two_panels(kernel: dict[str, Any], variant: int) -> None:
    for rows, columns in itertools.product(range(1, kernel["pair_rows"] + 1), (3, 16)):
        for segments, length, act in ((1, 34, "none"), (3, 4, "relu"), (5, 16, "gelu")):
            epilogue = act != "none"
            tile = Tile(kernel, rows, variant, segments, length, columns, act, epilogue, epilogue, pair=True)
            tile.run()
            tile.check()


@gemm_rows
@pytest.mark.parametrize("variant", [0, 2])
def test_a_reduction_in_chains_adds_up_and_writes_only_at_its_end(kernel: dict[str, Any], variant: int) -> None:
    tile = Tile(kernel, kernel["max_rows"], variant, segments=7, length=8, act="relu", residual=True)
    for first, last, part in ((True, False, slice(0, 3)), (False, False, slice(3, 4)), (False, True, slice(4, 7))):
        tile.run(first, last, part)
        assert bool(tile.c.written().any()) == last
        assert bool(tile.partial.written().all())
    tile.check()


@gemm_rows
def test_all_tiles_of_a_kernel_give_the_same_bits(kernel: dict[str, Any]) -> None:
    whole = Tile(kernel, kernel["max_rows"], 0, segments=3, length=20, act="silu")
    whole.run()
    expected = whole.c.values.as_strided((whole.rows, whole.n), (whole.c_row, 1))
    for rows in range(1, kernel["max_rows"]):
        part = Tile(kernel, rows, 0, segments=3, length=20, act="silu")
        part.a, part.at = whole.a, whole.at[:rows]
        part.run()
        assert torch.equal(part.c.values.as_strided((rows, part.n), (part.c_row, 1)), expected[:rows])


class Depthwise:
    """A problem for a depthwise kernel, and its answer."""

    def __init__(
        self,
        kernel: dict[str, Any],
        taps: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] | None = None,
        size: tuple[int, int] = (5, 7),
        channels: int = PANEL,
        plane: bool = False,
        paired: bool = False,
        act: str = "none",
    ) -> None:
        self.kernel, self.act, self.channels, self.size = kernel, act, channels, size
        input_dtype, self.output = dtype_of(kernel["input"]), dtype_of(kernel["output"])
        # top, bottom, left, right
        pads = pads or (taps[0] // 2, taps[0] // 2, taps[1] // 2, taps[1] // 2)
        reach = tuple(dilation[axis] * (taps[axis] - 1) + 1 for axis in (0, 1))
        self.out = tuple(
            (size[axis] + sum(pads[2 * axis : 2 * axis + 2]) - reach[axis]) // stride[axis] + 1 for axis in (0, 1)
        )
        self.x_pixel = PANEL if plane else channels + 3
        self.y_pixel = PANEL if plane else channels + 1
        if paired:
            # as a matrix unit wants bfloat16
            self.x_pixel, self.y_pixel = (
                2 * PANEL if type_ == torch.bfloat16 else PANEL for type_ in (input_dtype, self.output)
            )
        self.x_row, self.y_row = size[1] * self.x_pixel + (0 if plane else 2), self.out[1] * self.y_pixel
        x = random(channels, *size, dtype=input_dtype)
        self.x = Guarded((size[0] - 1) * self.x_row + (size[1] - 1) * self.x_pixel + channels, input_dtype)
        self._map(self.x.values, size, self.x_row, self.x_pixel).copy_(x)
        self.y = Guarded((self.out[0] - 1) * self.y_row + (self.out[1] - 1) * self.y_pixel + channels, self.output)
        # with an input in bfloat16 the weights are values of bfloat16, too
        weight, bias = random(channels, *taps, dtype=input_dtype, seed=1).float(), random(channels, seed=2)
        padded = F.pad(weight.flatten(1), (0, 0, 0, -channels % PANEL))
        self.weight = Guarded.of(padded.reshape(-1, PANEL, taps[0] * taps[1]).transpose(1, 2).contiguous())
        self.bias = Guarded.of(bias)
        self.numbers = {"x_row": self.x_row, "x_pixel": self.x_pixel, "y_row": self.y_row, "y_pixel": self.y_pixel}
        self.numbers |= {"height": size[0], "width": size[1], "out_height": self.out[0], "out_width": self.out[1]}
        self.numbers |= {"channels": channels, "pad_top": pads[0], "pad_left": pads[2]}
        for name, (high, wide) in (("kernel", taps), ("stride", stride), ("dilation", dilation)):
            self.numbers |= {f"{name}_h": high, f"{name}_w": wide}
        padded_x = F.pad(x.double(), (pads[2], pads[3], pads[0], pads[1]))

        def convolve(values: torch.Tensor, kernels_: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return F.conv2d(values[None], kernels_[:, None], offset, stride, 0, dilation, channels)[0]

        summed = convolve(padded_x, weight.double(), bias.double())
        magnitude = convolve(padded_x.abs(), weight.double().abs(), bias.double().abs())
        self.exact = ACTIVATIONS[act](summed)
        self.bound = 1.2 * (taps[0] * taps[1] + 8) * EPS * magnitude + 16 * EPS * self.exact.abs()
        self.bound += torch.finfo(self.output).eps * (self.exact.abs() + (magnitude if act != "none" else 0)) + EPS

    def _map(self, values: torch.Tensor, size: tuple[int, ...], row: int, pixel: int) -> torch.Tensor:
        return values.as_strided((self.channels, *size), (1, row, pixel))

    def run(self, rows: slice | None = None, channels: slice | None = None) -> None:
        """Output rows and channels of these ranges, all by default."""
        rows, channels = rows or slice(0, self.out[0]), channels or slice(0, self.channels)
        ranges = {"row_begin": rows.start, "row_end": rows.stop}
        ranges |= {"channel_begin": channels.start, "channel_end": channels.stop}
        kernels.dwconv(
            self.kernel["listed_name"],
            self.numbers | ranges,
            self.act,
            self.x.buffer,
            self.weight.buffer,
            self.bias.buffer,
            self.y.buffer,
        )

    def check(self, rows: slice = slice(None), channels: slice = slice(None)) -> None:
        """The result is right in these ranges, and nothing else was written."""
        mine = torch.zeros_like(self.y.values, dtype=torch.bool)
        self._map(mine, self.out, self.y_row, self.y_pixel)[channels, rows] = True
        assert torch.equal(self.y.written(), mine)
        y = self._map(self.y.values, self.out, self.y_row, self.y_pixel)
        excess = ((y.double() - self.exact).abs() - self.bound)[channels, rows]
        assert bool((excess <= 0).all()), f"{self.kernel['name']}: {excess.max().item():.3g} beyond the bound"


dwconv_rows = pytest.mark.parametrize("kernel", rows_of("dwconv"))
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 14, 15, 16, 21, 24, 28, 32)


@dwconv_rows
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 7])
def test_every_width_of_a_plane_and_of_an_nhwc_map(kernel: dict[str, Any], taps: int, stride: int) -> None:
    for width, plane in itertools.product(WIDTHS, (False, True)):
        problem = Depthwise(kernel, (taps, taps), (stride, stride), size=(4, width * stride), plane=plane)
        problem.run()
        problem.check()


@dwconv_rows
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
def test_every_width_of_planes_in_pairs(kernel: dict[str, Any], taps: int, stride: int) -> None:
    for width, act in itertools.product(WIDTHS, ("relu", "silu")):
        problem = Depthwise(kernel, (taps, taps), (stride, stride), size=(4, width * stride), paired=True, act=act)
        problem.run()
        problem.check()


@dwconv_rows
@pytest.mark.parametrize("taps", [2, 3])
def test_every_width_that_pooling_reads_without_padding(kernel: dict[str, Any], taps: int) -> None:
    layouts: list[dict[str, bool]] = [{}, {"plane": True}, {"paired": True}]
    for width, layout in itertools.product(WIDTHS, layouts):
        size = (6, 2 * (width - 1) + taps)
        problem = Depthwise(kernel, (taps, taps), (2, 2), pads=(0, 0, 0, 0), size=size, **layout)
        problem.run()
        problem.check()


@dwconv_rows
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 40])
def test_every_tail_of_channels(kernel: dict[str, Any], channels: int) -> None:
    for taps, width, act in itertools.product((3, 5), (5, 8, 14), ("relu", "hard_swish")):
        problem = Depthwise(kernel, (taps, taps), size=(3, width), channels=channels, act=act)
        problem.run()
        problem.check()


@dwconv_rows
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_of_a_depthwise_kernel(kernel: dict[str, Any], act: str) -> None:
    for plane, width in itertools.product((False, True), (5, 14)):
        problem = Depthwise(kernel, size=(5, width), plane=plane, act=act)
        problem.run()
        problem.check()


GEOMETRIES: list[dict[str, Any]] = [
    {"taps": (3, 5), "stride": (1, 2)},
    {"taps": (7, 3), "dilation": (2, 1), "pads": (6, 6, 1, 1)},
    {"dilation": (2, 2), "pads": (2, 2, 2, 2)},
    {"taps": (5, 5), "stride": (2, 2), "pads": (1, 2, 1, 2)},
    {"stride": (2, 2), "pads": (0, 1, 0, 1), "size": (8, 16)},
    {"stride": (3, 3), "pads": (0, 0, 0, 0)},
    {"pads": (4, 4, 5, 6), "size": (2, 3)},
    {"taps": (7, 7), "size": (1, 1)},
    {"taps": (5, 5), "size": (2, 8)},
]


@dwconv_rows
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_unusual_geometries(kernel: dict[str, Any], geometry: dict[str, Any]) -> None:
    for plane in (False, True):
        problem = Depthwise(kernel, **geometry, plane=plane, act="relu")
        problem.run()
        problem.check()


@dwconv_rows
@pytest.mark.parametrize("width", [7, 9, 16])
def test_a_range_of_rows_and_channels_leaves_the_rest_alone(kernel: dict[str, Any], width: int) -> None:
    for rows, channels in ((slice(2, 4), slice(16, 32)), (slice(0, 1), slice(32, 40)), (slice(5, 6), slice(0, 40))):
        problem = Depthwise(kernel, size=(6, width), channels=40, act="silu")
        problem.run(rows, channels)
        problem.check(rows, channels)


pointwise_rows = pytest.mark.parametrize("kernel", rows_of("pointwise"))
COUNTS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100)


@pointwise_rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch_does(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 6e-8, 65504.0, 65520.0, 1e38, 3.4e38])
    for n in COUNTS:
        x = torch.cat([random(n) * 1000, special])
        total = x.numel()
        narrow, wide = Guarded(total, dtype), Guarded(total)
        kernels.convert(kernel["listed_name"], name, False, Guarded.of(x).buffer, narrow.buffer, total)
        assert torch.equal(narrow.values, x.to(dtype))
        kernels.convert(kernel["listed_name"], name, True, narrow.buffer, wide.buffer, total)
        assert torch.equal(wide.values, narrow.values.float())
        assert bool((narrow.written() & wide.written()).all())


@pointwise_rows
def test_nan_stays_nan_when_converted(kernel: dict[str, Any]) -> None:
    # the smallest payloads too: rounding them up must not make an infinity
    patterns = [0x7FC00000, 0x7F800001, 0x7FFFFFFF]
    x = torch.tensor(patterns * 9, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = Guarded.of(torch.zeros(x.numel(), dtype=dtype))
        name = str(dtype).removeprefix("torch.")
        kernels.convert(kernel["listed_name"], name, False, Guarded.of(x).buffer, narrow.buffer, x.numel())
        assert bool(narrow.values.isnan().all())


@pointwise_rows
def test_three_planes_become_pixels_of_bfloat16(kernel: dict[str, Any]) -> None:
    for n in (*COUNTS, 224):
        plane = n + 3
        x, y = Guarded(2 * plane + n), Guarded(3 * n, torch.bfloat16)
        planes = x.values.as_strided((3, n), (plane, 1))
        planes.copy_(random(3, n))
        kernels.narrow_triples(kernel["listed_name"], x.buffer, plane, y.buffer, n)
        assert torch.equal(y.values.view(n, 3), planes.T.bfloat16())
        assert bool(y.written().all())


@pointwise_rows
def test_means_over_pixels(kernel: dict[str, Any]) -> None:
    for pixels, channels in itertools.product((1, 2, 49), COUNTS[1:]):
        pitch = channels + 5
        x, y = Guarded(pixels * pitch), Guarded(channels)
        block = x.values.as_strided((pixels, channels), (pitch, 1))
        block.copy_(random(pixels, channels))
        kernels.mean_pixels(kernel["listed_name"], x.buffer, pixels, pitch, channels, y.buffer)
        bound = (pixels + 2) * EPS * block.double().abs().mean(0)
        assert bool(((y.values.double() - block.double().mean(0)).abs() <= bound).all())
        assert bool(y.written().all())


@pointwise_rows
def test_softmax_of_rows(kernel: dict[str, Any]) -> None:
    for rows, columns in itertools.product((1, 3), COUNTS[1:]):
        pitch = columns + 4
        x = Guarded((rows - 1) * pitch + columns)
        block = x.values.as_strided((rows, columns), (pitch, 1))
        block.copy_(random(rows, columns) * 20)
        exact = (block.double() * 0.25).softmax(1)
        # exp's argument carries a rounding of the largest score
        bound = exact * EPS * (columns + 16 + 2 * block.double().abs().max() * 0.25)
        kernels.softmax_rows(kernel["listed_name"], x.buffer, rows, columns, pitch, 0.25)
        assert bool(((block.double() - exact).abs() <= bound + 1e-38).all())
        mine = torch.zeros_like(x.values, dtype=torch.bool)
        mine.as_strided((rows, columns), (pitch, 1)).fill_(True)
        assert torch.equal(x.written(), mine)


@pointwise_rows
def test_the_way_back_through_softmax(kernel: dict[str, Any]) -> None:
    for rows, columns in itertools.product((1, 3), COUNTS[1:]):
        pitch = columns + 4
        given, x = (Guarded((rows - 1) * pitch + columns) for _ in range(2))
        weights, block = (guarded.values.as_strided((rows, columns), (pitch, 1)) for guarded in (given, x))
        weights.copy_(random(rows, columns).softmax(1))
        block.copy_(random(rows, columns))
        w, g = weights.double(), block.double()
        exact = w * (g - (w * g).sum(1, keepdim=True)) * 0.25
        bound = EPS * (columns + 4) * (w * g).abs().sum(1, keepdim=True) + EPS * 4 * (w * g.abs() + exact.abs())
        kernels.softmax_gradient_rows(kernel["listed_name"], given.buffer, x.buffer, rows, columns, pitch, 0.25)
        assert bool(((block.double() - exact).abs() <= bound).all())
        mine = torch.zeros_like(x.values, dtype=torch.bool)
        mine.as_strided((rows, columns), (pitch, 1)).fill_(True)
        assert torch.equal(x.written(), mine)


winograd_rows = pytest.mark.parametrize("kernel", rows_of("winograd"))


# along an axis a tile's terms of its inputs and two outputs of its sums, in the order of kernels/winograd/winograd.h
WINOGRAD_TERMS = {
    1: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    2: [[1, 0, -1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, -1, 0, 1], [0, 0, 0, 1, 0]],
}
WINOGRAD_OUTPUTS = {1: [[1, 1, 1, 0], [0, 1, -1, -1]], 2: [[1, 1, 0], [0, 1, 1]]}


@winograd_rows
@pytest.mark.parametrize("stride", WINOGRAD_TERMS)
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 24, 33])
def test_winograds_terms(kernel: dict[str, Any], stride: int, channels: int) -> None:
    term_of = torch.tensor(WINOGRAD_TERMS[stride]).double()
    inputs = len(term_of)
    for tiles in (1, 2, 5):
        width = 2 * stride * (tiles - 1) + inputs
        x_row, plane = width * channels + 3, tiles * channels + 2
        x = Guarded((inputs - 1) * x_row + width * channels)
        pixels = x.values.as_strided((inputs, width, channels), (x_row, channels, 1))
        pixels.copy_(random(inputs, width, channels))
        terms = Guarded((inputs**2 - 1) * plane + tiles * channels)
        kernels.winograd_terms(kernel["listed_name"], stride, x.buffer, x_row, tiles, channels, terms.buffer, plane)
        windows = pixels.double().unfold(1, inputs, 2 * stride)
        exact = torch.einsum("ay,bx,ytcx->abtc", term_of, term_of, windows)
        layout = (inputs, inputs, tiles, channels), (inputs * plane, plane, channels, 1)
        error = (terms.values.as_strided(*layout).double() - exact).abs()
        assert bool((error <= 4 * EPS * windows.abs().amax()).all())
        mine = torch.zeros_like(terms.values, dtype=torch.bool)
        mine.as_strided(*layout).fill_(True)
        assert torch.equal(terms.written(), mine)


@winograd_rows
@pytest.mark.parametrize("stride", WINOGRAD_OUTPUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_winograds_sums_make_two_rows(kernel: dict[str, Any], act: str, stride: int) -> None:
    share = torch.tensor(WINOGRAD_OUTPUTS[stride]).double()
    count = share.shape[1]
    for width, rows in itertools.product((1, 2, 5, 6), (1, 2)):
        tiles = -(-width // 2)
        plane = tiles * PANEL + 3
        sums = Guarded((count**2 - 1) * plane + tiles * PANEL)
        given = sums.values.as_strided((count, count, tiles, PANEL), (count * plane, plane, PANEL, 1))
        given.copy_(random(count, count, tiles, PANEL))
        y_pixel = PANEL + 4
        y_row = width * y_pixel + 1
        y = Guarded((rows - 1) * y_row + (width - 1) * y_pixel + PANEL)
        given_row = y_row if rows == 2 else 0
        kernels.winograd_rows(
            kernel["listed_name"], stride, sums.buffer, plane, tiles, width, act, y.buffer, given_row, y_pixel
        )
        values = given.double()
        parts = torch.einsum("yi,xj,ijtc->ytxc", share, share, values).flatten(1, 2)[:rows, :width]
        exact = ACTIVATIONS[act](parts)
        layout = (rows, width, PANEL), (y_row, y_pixel, 1)
        error = (y.values.as_strided(*layout).double() - exact).abs()
        largest = torch.einsum("yi,xj,ijtc->ytxc", share.abs(), share.abs(), values.abs()).flatten(1, 2)[:rows, :width]
        assert bool((error <= 12 * EPS * (1 + largest)).all())
        mine = torch.zeros_like(y.values, dtype=torch.bool)
        mine.as_strided(*layout).fill_(True)
        assert torch.equal(y.written(), mine)


@pytest.mark.parametrize("family", LISTS)
def test_no_row_is_an_orphan(family: str) -> None:
    rows = LISTS[family]
    # a row without a symbol would have kept the module from loading; one under another's name hides a kernel
    assert [row["name"] for row in rows] == [row["listed_name"] for row in rows]
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(row["name"].endswith(f"_{row['tier']}") for row in rows)


@pytest.mark.parametrize("family", LISTS)
def test_lists_go_from_the_best_tier_to_the_scalar_one(family: str) -> None:
    order = native.module().compiled_tiers()
    ranks = [order.index(row["tier"]) for row in LISTS[family]]
    assert ranks == sorted(ranks, reverse=True)
    # a tier without a kernel for the stem computes it as any dense convolution
    assert family == "stem" or ranks[-1] == 0


def test_a_kernel_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="no kernel is called 'gemm_f64_quantum'"):
        kernels.dwconv("gemm_f64_quantum", {}, "none", b"", b"", b"", bytearray(4))
    problem = Depthwise(LISTS["dwconv"][-1])
    problem.act = "step"
    with pytest.raises(ValueError, match="`act` is no activation: 'step'"):
        problem.run()
