"""What a patch did: one row a module, with the reason for everything that keeps timm's path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .. import tables

REPLACED = "replaced"
PARTLY = "partly"
LEFT_ALONE = "left alone"


@dataclasses.dataclass(frozen=True)
class Row:
    """One module of the model."""

    #: its name in the model, "" for the model itself
    name: str
    #: timm's class
    cls: str
    #: `REPLACED`, `PARTLY` (timm's modules compute some of its pieces) or `LEFT_ALONE`
    status: str
    #: the pieces that ops compute, as "piece: op"
    fused: tuple[str, ...] = ()
    #: (module's name, why it keeps timm's path)
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def reason(self) -> str:
        """Why not everything is fused, in one line."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.kept:
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{', '.join(filter(None, names))}: {reason}".lstrip(": ") for reason, names in by_reason.items()]
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` replaced, what it replaced partly, and what it left alone, with reasons.

    `print(report)` is a table. Modules inside a replaced block that its ops stand in for
    have no row; rows that are alike are printed as one.
    """

    model: str
    rows: tuple[Row, ...]
    #: what holds for the model as a whole, e.g. that it is in train mode
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> list[Row]:
        """Rows of modules that the ops compute entirely."""
        return self._with(REPLACED)

    @property
    def partly(self) -> list[Row]:
        """Rows of drop-ins in which timm's modules compute some pieces."""
        return self._with(PARTLY)

    @property
    def left_alone(self) -> list[Row]:
        """Rows of modules that compute what they computed before."""
        return self._with(LEFT_ALONE)

    def _with(self, status: str) -> list[Row]:
        return [row for row in self.rows if row.status == status]

    def __str__(self) -> str:
        title = (
            f"mnv4_kernels.patch({self.model}): {len(self.replaced)} modules replaced, {len(self.partly)} partly, "
            f"{len(self.left_alone)} left alone"
        )
        return tables.render(title, ("modules", "class", "status", "ops, or the reason"), _lines(self.rows), self.notes)


def _lines(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        detail = row.reason if row.status != REPLACED else ", ".join(row.fused)
        alike.setdefault((row.cls, row.status, detail), []).append(row.name or "(model)")
    return [(_names(names), *key) for key, names in alike.items()]


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
