"""An image's first convolution on a matrix unit: sizes, paddings, layouts and epilogues, and nothing beside the result.

The image lies between NaNs and so does the result, as in test_microkernels.py; a value that is off by more than its
own rounding to bfloat16 and the sum's bound is wrong.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from microkernels import EPS, PANEL, Guarded, kernels, random
from torch.nn import functional as F

from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.testing import forced_tier, tiers

pytestmark = pytest.mark.skipif("amx" not in tiers(), reason="this processor has no amx")

#: Half of a last place of bfloat16.
ROUNDING = 2.0**-8


class Stem:
    """A problem and its answer.

    Args:
        layout: of the result, "pixels" of all channels, "planes" of 16, or "pairs" of those, side by side.
        pixels: whether the image's three channels lie side by side; else in planes.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int = 32,
        pad: tuple[int, int] = (1, 1),
        layout: str = "pixels",
        pixels: bool = False,
        act: str = "relu",
        stride: int = 2,
    ) -> None:
        self.act, self.channels = act, channels
        image = random(3, height, width)
        x_row = width * (3 if pixels else 1) + 2
        x_channel, x_pixel = (1, 3) if pixels else (height * x_row + 3, 1)
        self.x = Guarded(2 * x_channel + (height - 1) * x_row + (width - 1) * x_pixel + 1)
        self.x.values.as_strided((3, height, width), (x_channel, x_row, x_pixel)).copy_(image)
        self.weight, self.bias = random(channels, 3, 3, 3), random(-(-channels // PANEL) * PANEL, seed=1)
        top, left = pad
        padded = F.pad(image, (left, 2, top, 2))
        self.rows, self.columns = ((size + 1) // 2 for size in (height, width))
        exact = [t.bfloat16().double() for t in (padded, self.weight)]
        self.sums = F.conv2d(exact[0][None], exact[1], self.bias[:channels].double(), stride=2)[
            0, :, : self.rows, : self.columns
        ]
        self.largest = F.conv2d(exact[0][None].abs(), exact[1].abs(), stride=2)[0, :, : self.rows, : self.columns]
        y_pixel = {"pixels": channels + 1, "planes": PANEL, "pairs": 2 * PANEL}[layout]
        plane = self.rows * self.columns * y_pixel + 6
        y_panel = PANEL if layout == "pixels" else plane
        n = torch.arange(channels if layout != "pairs" else -(-channels // (2 * PANEL)) * 2 * PANEL)
        of_channel = n // PANEL * y_panel + n % PANEL
        if layout == "pairs":
            of_channel = n // (2 * PANEL) * y_panel + n % (2 * PANEL)
        pixel = torch.arange(self.rows * self.columns).view(self.rows, self.columns) * y_pixel
        self.at = of_channel[:, None, None] + pixel
        self.y = Guarded(int(self.at.max()) + 1, torch.bfloat16)
        self.numbers = {
            "x_channel": x_channel,
            "x_row": x_row,
            "x_pixel": x_pixel,
            "height": height,
            "width": width,
            "out_channels": channels,
            "out_height": self.rows,
            "out_width": self.columns,
            "stride": stride,
            "pad_top": top,
            "pad_left": left,
            "y_row": self.columns * y_pixel,
            "y_pixel": y_pixel,
            "y_panel": y_panel,
            "y_paired": layout == "pairs",
        }

    def run(self, begin: int = 0, end: int | None = None) -> bool:
        """Output rows [begin, end); whether there is a kernel for it."""
        rows = {"row_begin": begin, "row_end": self.rows if end is None else end}
        operands: list[Any] = [self.x.buffer, Guarded.of(self.weight).buffer, Guarded.of(self.bias).buffer]
        done: bool = kernels.stem(self.numbers | rows, self.act, *operands, self.y.buffer)
        return done

    def check(self, begin: int = 0, end: int | None = None) -> None:
        """That those rows are right and nothing else is written."""
        assert self.run(begin, end)
        mine = torch.zeros_like(self.y.values, dtype=torch.bool)
        rows = slice(begin, end)
        mine[self.at[:, rows]] = True
        assert torch.equal(self.y.written(), mine)
        actual = self.y.values[self.at[:, rows]].double()
        assert not bool(actual[self.channels :].any())
        exact = ACTIVATIONS[self.act](self.sums[:, rows])
        # the bias is two values of bfloat16
        bound = ROUNDING * exact.abs() + 30 * EPS * self.largest[:, rows] + 2.0**-16 * self.bias.abs().amax() + 1e-5
        assert bool(((actual[: self.channels] - exact).abs() <= bound).all())


LAYOUTS = ("pixels", "planes", "pairs")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [False, True])
def test_every_width(layout: str, pixels: bool) -> None:
    for width in (1, 2, 3, 15, 16, 17, 31, 32, 33, 34, 62, 63, 64, 65, 66, 95, 96, 97, 130, 224):
        Stem(5, width, layout=layout, pixels=pixels).check()


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("pad", list(itertools.product((0, 1, 2), repeat=2)))
def test_every_padding(pad: tuple[int, int], pixels: bool) -> None:
    for height, width in ((1, 1), (2, 3), (4, 33), (7, 64), (9, 70)):
        Stem(height, width, pad=pad, pixels=pixels).check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 40, 48, 64, 72])
def test_every_count_of_channels(channels: int, layout: str) -> None:
    for width in (20, 64, 72):
        Stem(6, width, channels, layout=layout).check()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_epilogue(act: str) -> None:
    for channels, layout in ((32, "pixels"), (24, "pairs")):
        Stem(6, 70, channels, layout=layout, act=act).check()


def test_a_range_of_rows_leaves_the_rest_alone() -> None:
    for begin, end in ((0, 1), (0, 5), (3, 4), (2, 7), (6, 7)):
        Stem(13, 50).check(begin, end)


def test_rows_are_the_same_bits_wherever_a_worker_begins() -> None:
    whole, part = Stem(13, 50), Stem(13, 50)
    whole.run()
    for begin, end in ((0, 1), (1, 4), (4, 7)):
        part.run(begin, end)
    assert torch.equal(whole.y.values[whole.at], part.y.values[part.at])


def test_nan_and_infinity_stay_where_their_windows_are() -> None:
    for value in (float("nan"), float("inf")):
        problem = Stem(9, 70, act="none")
        problem.x.values[4 * problem.numbers["x_row"] + 33] = value
        assert problem.run()
        finite = problem.y.values[problem.at].isfinite().all(dim=0)
        touched = torch.zeros(problem.rows, problem.columns, dtype=torch.bool)
        # row 4 and column 33 lie in the windows of outputs 2, and of 16 and 17
        touched[2, 16:18] = True
        assert torch.equal(~finite, touched)


def test_what_it_does_not_take_is_left_to_the_others() -> None:
    assert not Stem(8, 8, 20).run()
    assert not Stem(8, 8, stride=1).run()
    with forced_tier("avx512bf16"):
        assert not Stem(8, 8).run()
