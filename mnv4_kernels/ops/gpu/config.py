"""Launch configs: plain frozen data, one class per kernel family, and how they are written to a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeVar


@dataclass(frozen=True)
class Config:
    """What every launch chooses: warps of a program and stages of its software pipeline."""

    warps: int
    stages: int


@dataclass(frozen=True)
class DepthwiseConfig(Config):
    """Tile of `dwconv_bn_act`: `rows` output rows in registers of `columns` output columns, `channels` wide."""

    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class GemmConfig(Config):
    """Tile of a matrix product; `group_m` row tiles share their column tiles in L2."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8


@dataclass(frozen=True)
class DepthwiseGemmConfig(Config):
    """Tile of a GEMM whose A operand is a depthwise convolution: `rows` products of [columns, block_k]."""

    rows: int
    columns: int
    block_n: int
    block_k: int


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Tile of `mqa`: `queries` rows at a time, `tiles` of them by one program, `keys` held on chip."""

    queries: int
    tiles: int
    keys: int


@dataclass(frozen=True)
class PoolConfig(Config):
    """Tile of the global average pool: `positions` at a time, `channels` wide."""

    positions: int
    channels: int


@dataclass(frozen=True)
class PositionsConfig(Config):
    """Tile of a pass over pixels: `positions` of them at a time, `channels` wide."""

    positions: int
    channels: int


@dataclass(frozen=True)
class SplitConfig(Config):
    """Tile of a weight's gradient [block_n, block_k]; `parts` programs share the pixels, `block_m` at a time."""

    block_m: int
    block_n: int
    block_k: int
    parts: int


AnyConfig = TypeVar("AnyConfig", bound=Config)

#: Name in a tuned file -> class.
CONFIGS: dict[str, type[Config]] = {
    cls.__name__: cls
    for cls in (
        DepthwiseConfig,
        GemmConfig,
        DepthwiseGemmConfig,
        AttentionConfig,
        PoolConfig,
        PositionsConfig,
        SplitConfig,
    )
}


def to_json(config: Config) -> dict[str, Any]:
    """A config as JSON-able data."""
    return {"kind": type(config).__name__, **asdict(config)}


def from_json(data: dict[str, Any]) -> Config:
    """The config that `to_json` wrote; raises `ValueError` on a kind or field that no kernel knows."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in CONFIGS:
        raise ValueError(f"`kind` must be one of {', '.join(CONFIGS)}, got {kind!r}")
    try:
        return CONFIGS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"a {kind} can't be made of {sorted(fields)}") from error
