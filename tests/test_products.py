"""Products by every row of the kernels' list: rows, panels and images that fill no tile, and nothing beside the result.

Operands lie between NaNs, so that a value too many shows. Bounds are those of test_microkernels.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from microkernels import EPS, LISTS, PANEL, Guarded, dtype_of, kernels, pack, random, rows_of

from mnv4_kernels.backends import native
from mnv4_kernels.ops.activation import ACTIVATIONS
from mnv4_kernels.testing import forced_tier, tiers

# a kernel that multiplies float32 in terms, too, is a second one
TERMS = [
    pytest.param(row.values[0] | {"terms": True}, marks=row.marks, id=f"{row.id}-terms")
    for row in rows_of("gemm")
    if row.values[0]["split"]
]
MATRIX = [row for row in rows_of("gemm") if row.values[0]["matrix"]]
gemm_rows = pytest.mark.parametrize("kernel", [*rows_of("gemm"), *TERMS])
matrix_rows = pytest.mark.parametrize("kernel", [*MATRIX, *TERMS])
register_rows = pytest.mark.parametrize("kernel", [row for row in rows_of("gemm") if not row.values[0]["matrix"]])


def takes(kernel: dict[str, Any], segments: int, length: int) -> bool:
    """In terms, several segments are whole panels."""
    return "terms" not in kernel or segments == 1 or length % PANEL == 0


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
        paired: bool = False,
        paired_residual: bool = False,
        first: int = 0,
        chain: int | None = None,
    ) -> None:
        self.kernel, self.rows, self.n, self.images, self.act = kernel, rows, n, images, act
        self.input, self.output = dtype_of(kernel["input"]), dtype_of(kernel["output"])
        self.panels = -(-n // PANEL)
        self.length, self.chain = length, chain or kernels.longest_chain
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
        # planes of a panel each, of two, or whole rows; c begins with panel `first`
        planes = PANEL if panel_major else None
        self.steps, at = self._layout("c", 2 * PANEL if paired else planes, first)
        self.steps["c_first"] = first
        self.c_at = at[..., :n]
        # what lies beside a last panel without partner
        self.partner_at = at[..., n:] if paired else at[..., :0]
        self.c = Guarded(int(at.max()) + 1, self.output)
        self.residual = None
        residual_steps, at = self._layout("residual", 2 * PANEL if paired_residual else planes, 0)
        self.steps |= residual_steps
        if residual:
            self.residual = Guarded(int(at.max()) + 1, self.output)
            self.residual.values[at[..., :n]] = random(images, rows, n, dtype=self.output, seed=6)
            self.exact_residual = self.residual.values[at[..., :n]].double()

    def _layout(self, name: str, planes: int | None, first: int) -> tuple[dict[str, int], torch.Tensor]:
        """Strides, and where the columns from `first` on are; in planes of so many channels, or in whole rows."""
        row = planes or self.n + 3
        panel = self.images * (self.rows + 1) * planes if planes else PANEL
        image = self.rows * row + (planes or 7)
        together = (planes or PANEL) // PANEL
        columns = -(-self.panels // together) * together * PANEL if planes else self.n
        at = torch.tensor(
            [
                [
                    [
                        i * image + r * row + (p - first) // together * panel + p % together * PANEL + j % PANEL
                        for j in range(columns)
                        for p in (max(j // PANEL, first),)
                    ]
                    for r in range(self.rows)
                ]
                for i in range(self.images)
            ]
        )
        steps = {"row": row, "panel": panel, "image": image, "paired": int(together == 2)}
        return {f"{name}_{key}": value for key, value in steps.items()}, at

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
            "split": int("terms" in self.kernel),
            "chain": self.chain,
        }
        numbers |= self.steps
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
        chain = min(b.shape[0], self.chain)
        bound = 1.2 * (chain + 8) * EPS * (self.exact_a.abs() @ b.abs() + bias.abs()) + 16 * EPS * exact.abs()
        if self.gamma is not None:
            gamma = self.gamma.double()[: self.n]
            exact, bound = exact * gamma, bound * gamma.abs()
        if self.residual is not None:
            exact = exact + self.exact_residual
        bound = bound + torch.finfo(self.output).eps * exact.abs() + EPS
        columns = slice((panels.start or 0) * PANEL, self.n if panels.stop is None else panels.stop * PANEL)
        excess = ((self.c.values[self.c_at].double() - exact).abs() - bound).flatten(0, 1)[rows, columns]
        assert bool((excess <= 0).all()), f"{self.kernel['name']}: {excess.max().item():.3g} beyond the bound"
        mine = torch.zeros_like(self.c.values, dtype=torch.bool)
        mine[self.c_at.flatten(0, 1)[rows, columns]] = True
        if columns.stop >= self.n:
            beside = self.partner_at.flatten(0, 1)[rows]
            mine[beside] = True
            assert not bool(self.c.values[beside].any()), "zeros beside the last panel"
        assert torch.equal(self.c.written(), mine)


@gemm_rows
@pytest.mark.parametrize("rows", [1, 2, 13, 15, 16, 17, 31, 33, 49, 130])
def test_any_number_of_rows_and_columns(kernel: dict[str, Any], rows: int) -> None:
    for n, (segments, length) in itertools.product(
        (1, 16, 24, 40, 64, 81), ((1, 2), (1, 64), (2, 16), (3, 16), (3, 10))
    ):
        if not takes(kernel, segments, length):
            continue
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
        if not takes(kernel, segments, length):
            continue
        for part in (None, slice(1, rows * images), slice(rows * images - 1, rows * images)):
            product = Product(kernel, rows, 48, segments, length, images, residual=True, panel_major=True)
            product.run(part, packed=True)
            product.check(part or slice(None))


@matrix_rows
@pytest.mark.parametrize("n", [16, 32, 48, 112])
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_panels_in_pairs(kernel: dict[str, Any], act: str, n: int) -> None:
    for residual, gamma, packed in itertools.product((False, True), repeat=3):
        for part in (None, slice(3, 40)):
            product = Product(kernel, 25, n, 5, 16, 2, act, gamma, residual, True, paired=True, paired_residual=True)
            product.run(part, packed=packed)
            product.check(part or slice(None))


@matrix_rows
@pytest.mark.parametrize(("rows", "images"), [(1, 150), (7, 20), (31, 5), (49, 4), (64, 3), (170, 1)])
@pytest.mark.parametrize(("segments", "length"), [(1, 32), (2, 32), (3, 96), (5, 16), (1, 70)])
def test_blocks_that_are_finished_while_others_multiply(
    kernel: dict[str, Any], rows: int, images: int, segments: int, length: int
) -> None:
    for paired, residual, act in itertools.product((False, True), (False, True), ("none", "relu", "gelu")):
        for n, part in ((64, None), (80, slice(5, rows * images - 2))):
            product = Product(
                kernel,
                rows,
                n,
                segments,
                length,
                images,
                act,
                gamma=act != "relu",
                residual=residual,
                panel_major=True,
                paired=paired,
                paired_residual=paired,
            )
            product.run(part, packed=images > 1)
            product.check(part or slice(None))


@matrix_rows
@pytest.mark.parametrize("panels", [(0, 1), (1, 2), (1, 4), (2, 5), (4, 5)])
def test_some_panels_of_pairs_leave_the_rest_alone(kernel: dict[str, Any], panels: tuple[int, int]) -> None:
    product = Product(
        kernel, 40, 80, 2, 16, act="relu", residual=True, panel_major=True, paired=True, paired_residual=True
    )
    product.run(panels=slice(*panels))
    product.check(panels=slice(*panels))


@matrix_rows
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_panels_behind_the_first_that_a_result_holds(kernel: dict[str, Any], first: int) -> None:
    product = Product(kernel, 20, 64, 2, 16, residual=True, panel_major=True, paired_residual=True, first=first)
    product.run(panels=slice(first, 4))
    product.check(panels=slice(first, 4))


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


@register_rows
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 36])
def test_short_chains_of_few_and_of_many_rows(kernel: dict[str, Any], rows: int) -> None:
    for n, (segments, length) in itertools.product(
        (1, 16, 24, 48, 80, 120), ((1, 2), (1, 16), (1, 18), (1, 80), (5, 16), (3, 22))
    ):
        product = Product(kernel, rows, n, segments, length, chain=kernels.short_chain)
        product.run()
        product.check()


@register_rows
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_every_epilogue_of_short_chains(kernel: dict[str, Any], act: str) -> None:
    for rows, gamma, residual, planes in itertools.product((1, 9), (False, True), (False, True), (False, True)):
        product = Product(
            kernel, rows, 80, 4, 16, 2, act, gamma, residual, panel_major=planes, chain=kernels.short_chain
        )
        product.run()
        product.check()


@register_rows
@pytest.mark.parametrize("length", [16, 24])
def test_parts_of_short_chains_have_the_bits_of_the_whole(kernel: dict[str, Any], length: int) -> None:
    def problem() -> Product:
        return Product(kernel, 19, 7 * PANEL, 3, length, chain=kernels.short_chain)

    whole, parts = problem(), problem()
    whole.run()
    # each way in which rows and panels may be grouped
    for rows, panels in itertools.product(
        (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 19)), (slice(0, 1), slice(1, 3), slice(3, 7))
    ):
        parts.run(rows, panels)
    assert bool(whole.c.written()[whole.c_at].all())
    assert torch.equal(whole.c.values.nan_to_num(), parts.c.values.nan_to_num())


@register_rows
def test_short_chains_of_a_long_reduction_end_exact(kernel: dict[str, Any]) -> None:
    """A head adds up a thousand products: within rounding a chain of 16 and the result, whatever the length."""
    if kernel["input"] != "float32" or kernel["output"] != "float32":
        pytest.skip("rounding the result would hide it")
    product = Product(kernel, 4, 64, 1, 1280, chain=kernels.short_chain)
    product.run()
    exact = product.exact_a @ product.b.double()[:, :64] + product.bias.double()
    # chains in float32, rounded at each product and each addition, and their sum in float64
    products = product.exact_a[0].float()[:, :, None] * product.b[:, :64]
    chains = torch.zeros(4, 1280 // kernels.short_chain, 64)
    for step in products.unflatten(1, (-1, kernels.short_chain)).unbind(2):
        chains = chains + step
    plain = (chains.double().sum(1) + product.bias.double()[:64]).float().double()
    error, wanted = ((y - exact).norm() / exact.norm() for y in (product.c.values[product.c_at].double(), plain))
    assert error <= 1.1 * wanted, f"{error:.3g}, chains of 16 in plain torch {wanted:.3g}"


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


@pytest.mark.parametrize("kernel", TERMS)
def test_terms_lose_nothing_of_a_single_product(kernel: dict[str, Any]) -> None:
    product = Product(kernel, 64, 48, 2, 16)
    # one value a row, so that no sum hides an error: a missing product of terms would be 2^-17 of it or more
    kept = torch.arange(64) % 32
    product.exact_a[0] *= torch.nn.functional.one_hot(kept, 32)
    offsets = torch.tensor([start + k for start in product.segments for k in range(16)])
    at = torch.arange(64)[:, None] * product.a_row + offsets
    product.a.values[at] = product.exact_a[0].float()
    product.bias.zero_()
    product.run()
    exact = product.exact_a[0] @ product.b.double()[:, :48]
    error = (product.c.values[product.c_at][0].double() - exact).abs()
    assert bool((error <= 2 * torch.finfo(torch.float32).eps * exact.abs()).all())


@pytest.mark.parametrize("kernel", TERMS)
@pytest.mark.parametrize("depth", [64, 160, 960])
def test_terms_are_as_exact_as_multiply_adds(kernel: dict[str, Any], depth: int) -> None:
    errors = []
    for name in (kernel, {key: value for key, value in kernel.items() if key != "terms"}):
        product = Product(name, 96, 96, depth // 16, 16)
        product.run()
        exact = product.exact_a @ product.b.double()[:, :96] + product.bias.double()
        errors.append((product.c.values[product.c_at].double() - exact).norm() / exact.norm())
    assert errors[0] <= 1.1 * errors[1]


def test_a_tier_with_a_matrix_unit_takes_its_kernels_for_bfloat16() -> None:
    units = {row["tier"] for row in LISTS["gemm"] if row["matrix"]}
    assert units == ({"amx"} if "amx" in native.module().compiled_tiers() else set())
    for tier in tiers():
        with forced_tier(tier):
            assert kernels.gemm_name("bfloat16", "bfloat16").endswith("_amx") == (tier in units)
