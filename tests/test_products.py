"""Products by every row of the kernels' list: rows, panels and images that fill no tile, and nothing beside the result.

Operands lie between NaNs, so that a value too many shows. Bounds are those of test_microkernels.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from microkernels import EPS, LISTS, PANEL, Guarded, dtype_of, kernels, pack, random, rows_of

from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.testing import forced_tier, tiers

gemm_rows = pytest.mark.parametrize("kernel", rows_of("gemm"))
matrix_rows = pytest.mark.parametrize("kernel", [row for row in rows_of("gemm") if row.values[0]["matrix"]])


class Product:
    """Images of rows times panels of weights, and the answer.

    Rows, images, panels and segments lie apart, in an order that is not theirs in memory.
    """

    def __init__(
        self,
        kernel: dict[str, Any],
        rows: int,
        n: int,
        segments: int = 1,
        length: int = 32,
        images: int = 1,
        act: str = "none",
        gamma: bool = False,
        residual: bool = False,
        panel_major: bool = False,
    ) -> None:
        self.kernel, self.rows, self.n, self.images, self.act = kernel, rows, n, images, act
        self.input, self.output = dtype_of(kernel["input"]), dtype_of(kernel["output"])
        self.panels = -(-n // PANEL)
        self.length = length
        self.a_row = segments * (length + 2) + 6
        self.a_image = rows * self.a_row + 10
        self.segments = [(length + 2) * index for index in reversed(range(segments))]
        offsets = [start + k for start in self.segments for k in range(length)]
        at = torch.tensor(
            [[[i * self.a_image + r * self.a_row + k for k in offsets] for r in range(rows)] for i in range(images)]
        )
        self.a = Guarded(int(at.max()) + 1, self.input)
        self.a.values[at] = random(images, rows, segments * length, dtype=self.input)
        self.exact_a = self.a.values[at].double()
        self.b = random(segments * length, self.panels * PANEL, dtype=self.input, seed=3)
        self.packed_b = Guarded.of(pack(self.b, self.input))
        self.bias = random(self.panels * PANEL, seed=4)
        self.gamma = random(self.panels * PANEL, seed=5) if gamma else None
        # planes of a panel each, or whole rows
        self.c_row = PANEL if panel_major else self.n + 3
        self.c_panel = (images * rows + 1) * PANEL if panel_major else PANEL
        self.c_image = rows * self.c_row + (0 if panel_major else 7)
        self.c_at = torch.tensor(
            [
                [
                    [i * self.c_image + r * self.c_row + j // PANEL * self.c_panel + j % PANEL for j in range(n)]
                    for r in range(rows)
                ]
                for i in range(images)
            ]
        )
        self.c = Guarded(int(self.c_at.max()) + 1, self.output)
        self.residual = None
        if residual:
            self.residual = Guarded(self.c.values.numel(), self.output)
            self.residual.values[self.c_at] = random(images, rows, n, dtype=self.output, seed=6)

    def run(self, rows: slice | None = None, panels: slice | None = None, packed: bool = False) -> None:
        """Rows of all images and panels of these ranges, all by default."""
        rows, panels = rows or slice(0, self.images * self.rows), panels or slice(0, self.panels)
        numbers = {
            "a_row": self.a_row,
            "a_image": self.a_image,
            "segment_length": self.length,
            "b_panel": self.b.shape[0] * PANEL,
            "n": self.n,
            "image_rows": self.rows,
            "images": self.images,
            "rows_behind": 0,
            "packed": int(packed),
        }
        numbers |= {f"c_{step}": getattr(self, f"c_{step}") for step in ("row", "panel", "image")}
        numbers |= {f"residual_{step}": getattr(self, f"c_{step}") for step in ("row", "panel", "image")}
        numbers |= {"row_begin": rows.start, "row_end": rows.stop}
        numbers |= {"panel_begin": panels.start, "panel_end": panels.stop}
        kernels.gemm(
            self.kernel["listed_name"],
            numbers,
            self.segments,
            self.act,
            self.a.buffer,
            self.packed_b.buffer,
            Guarded.of(self.bias).buffer,
            None if self.gamma is None else Guarded.of(self.gamma).buffer,
            None if self.residual is None else self.residual.buffer,
            self.c.buffer,
        )

    def check(self, rows: slice = slice(None), panels: slice = slice(None)) -> None:
        """What was asked for is act(a b + bias) * gamma + residual, and nothing else was written."""
        b, bias = self.b.double()[:, : self.n], self.bias.double()[: self.n]
        exact = ACTIVATIONS[self.act](self.exact_a @ b + bias)
        bound = 1.2 * (b.shape[0] + 8) * EPS * (self.exact_a.abs() @ b.abs() + bias.abs()) + 16 * EPS * exact.abs()
        if self.gamma is not None:
            gamma = self.gamma.double()[: self.n]
            exact, bound = exact * gamma, bound * gamma.abs()
        if self.residual is not None:
            exact = exact + self.residual.values[self.c_at].double()
        bound = bound + torch.finfo(self.output).eps * exact.abs() + EPS
        columns = slice((panels.start or 0) * PANEL, self.n if panels.stop is None else panels.stop * PANEL)
        excess = ((self.c.values[self.c_at].double() - exact).abs() - bound).flatten(0, 1)[rows, columns]
        assert bool((excess <= 0).all()), f"{self.kernel['name']}: {excess.max().item():.3g} beyond the bound"
        mine = torch.zeros_like(self.c.values, dtype=torch.bool)
        mine[self.c_at.flatten(0, 1)[rows, columns]] = True
        assert torch.equal(self.c.written(), mine)


@gemm_rows
@pytest.mark.parametrize("rows", [1, 2, 13, 15, 16, 17, 31, 33, 49, 130])
def test_any_number_of_rows_and_columns(kernel: dict[str, Any], rows: int) -> None:
    for n, (segments, length) in itertools.product(
        (1, 16, 24, 40, 64, 81), ((1, 2), (1, 64), (2, 16), (3, 16), (3, 10))
    ):
        product = Product(kernel, rows, n, segments, length)
        product.run()
        product.check()


@gemm_rows
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_epilogue_of_a_product(kernel: dict[str, Any], act: str) -> None:
    for n, gamma, residual, planes in itertools.product((32, 40), (False, True), (False, True), (False, True)):
        product = Product(
            kernel, 21, n, 2, 16, images=2, act=act, gamma=gamma, residual=residual, panel_major=planes and n == 32
        )
        product.run()
        product.check()


@gemm_rows
@pytest.mark.parametrize(("rows", "images"), [(1, 40), (4, 4), (9, 5), (16, 3), (49, 2)])
def test_rows_of_several_images(kernel: dict[str, Any], rows: int, images: int) -> None:
    for part in (None, slice(3, images * rows - 1)):
        product = Product(kernel, rows, 48, 3, 16, images, "relu", residual=True, panel_major=True)
        product.run(part)
        product.check(part or slice(None))


@matrix_rows
@pytest.mark.parametrize(("rows", "images"), [(1, 40), (7, 1), (49, 3), (64, 1)])
def test_packed_rows_from_any_row_on(kernel: dict[str, Any], rows: int, images: int) -> None:
    for segments, length in ((2, 16), (5, 16), (3, 10), (1, 70)):
        for part in (None, slice(1, rows * images), slice(rows * images - 1, rows * images)):
            product = Product(kernel, rows, 48, segments, length, images, residual=True, panel_major=True)
            product.run(part, packed=True)
            product.check(part or slice(None))


@gemm_rows
def test_parts_of_a_product_have_the_bits_of_the_whole(kernel: dict[str, Any]) -> None:
    def problem() -> Product:
        return Product(kernel, 75, 80, 4, 16, act="silu")

    whole, parts = problem(), problem()
    whole.run()
    for rows, panels in itertools.product((slice(0, 7), slice(7, 40), slice(40, 75)), (slice(0, 1), slice(1, 5))):
        parts.run(rows, panels)
    assert torch.equal(whole.c.written(), parts.c.written())
    assert torch.equal(whole.c.values.nan_to_num(), parts.c.values.nan_to_num())


@matrix_rows
def test_nan_and_infinity_stay_in_their_row(kernel: dict[str, Any]) -> None:
    product = Product(kernel, 40, 32, 3, 16)
    for row, value in ((5, float("nan")), (20, float("inf"))):
        product.a.values[row * product.a_row] = value
    # K ends within a tile: what is behind it, here of the next panel, must not count
    product.packed_b.values[product.b.shape[0] * PANEL] = float("inf")
    product.run()
    finite = product.c.values[product.c_at][0].isfinite()
    assert not bool(finite[[5, 20], :PANEL].any())
    others = torch.ones(40, dtype=torch.bool)
    others[[5, 20]] = False
    assert bool(finite[others, :PANEL].all())


def test_a_tier_with_a_matrix_unit_takes_its_kernels_for_bfloat16() -> None:
    units = {row["tier"] for row in LISTS["gemm"] if row["matrix"]}
    assert units == {"amx"}
    for tier in tiers():
        with forced_tier(tier):
            assert kernels.gemm_name("bfloat16", "bfloat16").endswith("_amx") == (tier in units)
