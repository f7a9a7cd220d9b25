"""The config of one launch: the tuned one of this device where there is one, else the heuristic's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ... import tuned
from ..support import dtype_name
from . import heuristics
from .config import (
    AnyConfig,
    AttentionConfig,
    Config,
    DepthwiseConfig,
    DepthwiseGemmConfig,
    GemmConfig,
    PoolConfig,
    PositionsConfig,
    SplitConfig,
)
from .traffic import Ceilings

#: Configs that come before the tuned ones, and the choices made meanwhile; innermost last.
_FORCED: list[tuple[Mapping[str, Config], dict[str, Config]]] = []

#: Capability and multiprocessors that heuristics assume for tensors on no GPU.
_ASSUMED = [(heuristics.DEFAULT_CAPABILITY, heuristics.DEFAULT_MULTIPROCESSORS)]


@contextmanager
def assume(capability: int, multiprocessors: int = heuristics.DEFAULT_MULTIPROCESSORS) -> Iterator[None]:
    """Within, tensors on no GPU get the configs of a GPU of this compute capability (80, 86, 90, 100)."""
    _ASSUMED.append((capability, multiprocessors))
    _forget()
    try:
        yield
    finally:
        _ASSUMED.pop()
        _forget()


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[str | None, int, int]:
    """(name, multiprocessors, capability); a device that is not a GPU has no name and what is assumed."""
    if device.type != "cuda":
        capability, multiprocessors = _ASSUMED[-1]
        return None, multiprocessors, capability
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor


def _forget() -> None:
    """Empties every cache of a choice."""
    choices: tuple[Any, ...] = (
        _device, depthwise_config, gemm_config, depthwise_gemm_config, conv_pair_config, expand_project_config,
        kv_config, attention_config, projected_attention_config, pool_config, training_depthwise_config,
        depthwise_backward_config, training_gemm_config, split_config, positions_config, attention_backward_config,
        ceilings,
    )  # fmt: skip
    for choice in choices:
        choice.cache_clear()


@lru_cache(maxsize=16)
def ceilings(device: torch.device) -> Ceilings:
    """What the gate takes a device for: measured where a tuned file names it, else its data sheet's share.

    Rates that no driver tells are an H100's, in proportion to the multiprocessors.
    """
    name, multiprocessors, _ = _device(device)
    default = Ceilings()
    part = multiprocessors / default.multiprocessors
    if name is None:
        return default if part == 1 else _scaled(default, part, multiprocessors)
    found = _scaled(default, part, multiprocessors)
    properties: Any = torch.cuda.get_device_properties(device)
    found = replace(found, l2_bytes=getattr(properties, "L2_cache_size", default.l2_bytes))
    # kHz, two transfers a clock; copies reach nine tenths of it on an H100
    bits = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0)
    if bits:
        found = replace(found, copy_gb_s=0.9 * bits / 8e9)
    measured = tuned.provenance(name)
    return replace(found, **{key: measured[key] for key in ("copy_gb_s", "matmul_tflop_s") if key in measured})


def _scaled(ceilings: Ceilings, part: float, multiprocessors: int) -> Ceilings:
    rates = ("l2_gb_s", "l1_gb_s", "matmul_tflop_s", "fma_tflop_s")
    return replace(ceilings, multiprocessors=multiprocessors, **{key: part * getattr(ceilings, key) for key in rates})


@contextmanager
def forced(configs: Mapping[str, Config]) -> Iterator[dict[str, Config]]:
    """Within, these configs are used for their keys, before tuned ones; yields {key: config} of every choice made."""
    made: dict[str, Config] = {}
    _FORCED.append((configs, made))
    _forget()
    try:
        yield made
    finally:
        _FORCED.pop()
        _forget()


def _choose(kind: type[AnyConfig], device: torch.device, key: str, heuristic: Callable[[], AnyConfig]) -> AnyConfig:
    """The forced, else the tuned, else the heuristic's config of `key`."""
    name = _device(device)[0]
    known = [configs.get(key) for configs, _ in reversed(_FORCED)]
    known.append(tuned.lookup(name, key) if name is not None else None)
    chosen = next((config for config in known if isinstance(config, kind)), None) or heuristic()
    for _, made in _FORCED:
        made[key] = chosen
    return chosen


@lru_cache(maxsize=4096)
def depthwise_config(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> DepthwiseConfig:
    """Config of `dwconv_bn_act` with output `shape` [N, C, OH, OW]."""
    key = f"dwconv_bn_act/{dtype_name(dtype)}/{'x'.join(map(str, shape))}/k{kernel[0]}s{stride[0]}"
    return _choose(
        DepthwiseConfig,
        device,
        key,
        lambda: heuristics.depthwise(shape, kernel, stride, dtype.itemsize, _device(device)[1]),
    )


@lru_cache(maxsize=4096)
def gemm_config(op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, taps: int = 1) -> GemmConfig:
    """Config of an [m, k] x [k, n] product of `op`, with `taps` reductions of length k."""
    return _choose(
        GemmConfig,
        device,
        f"{op}/{dtype_name(dtype)}/m{m}n{n}k{k}t{taps}",
        lambda: heuristics.gemm(m, n, k, dtype.itemsize, *_device(device)[1:], taps=taps),
    )


@lru_cache(maxsize=4096)
def depthwise_gemm_config(
    op: str,
    shape: tuple[int, ...],
    n: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> DepthwiseGemmConfig:
    """Config of a depthwise convolution with output `shape` [N, C, OH, OW] inside a GEMM with n outputs."""
    key = f"{op}/{dtype_name(dtype)}/{'x'.join(map(str, shape))}/n{n}k{kernel[0]}s{stride[0]}"
    return _choose(
        DepthwiseGemmConfig,
        device,
        key,
        lambda: heuristics.depthwise_gemm(shape, n, dtype.itemsize, _device(device)[1]),
    )


@lru_cache(maxsize=4096)
def conv_pair_config(
    m: int, hidden: int, outputs: int, channels: int, dtype: torch.dtype, device: torch.device
) -> GemmConfig:
    """Config of `conv_pwconv`: m pixels, `channels` to `hidden` to `outputs`."""
    return _choose(
        GemmConfig,
        device,
        f"conv_pwconv/{dtype_name(dtype)}/m{m}h{hidden}n{outputs}c{channels}",
        lambda: heuristics.conv_pair(m, hidden, outputs, channels, dtype.itemsize, *_device(device)[1:]),
    )


@lru_cache(maxsize=4096)
def expand_project_config(
    m: int, channels: int, hidden: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> GemmConfig:
    """Config of both products of a block in one launch: m pixels, `channels` to `hidden` to `outputs`."""
    return _choose(
        GemmConfig,
        device,
        f"expand_project/{dtype_name(dtype)}/m{m}c{channels}h{hidden}n{outputs}",
        lambda: heuristics.expand_project(m, channels, hidden, outputs, dtype.itemsize, *_device(device)[1:]),
    )


@lru_cache(maxsize=4096)
def kv_config(m: int, depth: int, channels: int, dtype: torch.dtype, device: torch.device) -> GemmConfig:
    """Config of `kv_downsample`: m positions, keys and values up to `depth` wide."""
    return _choose(
        GemmConfig,
        device,
        f"kv_downsample/{dtype_name(dtype)}/m{m}d{depth}c{channels}",
        lambda: heuristics.kv(m, depth, dtype.itemsize, _device(device)[1]),
    )


@lru_cache(maxsize=4096)
def attention_config(
    queries: int, keys: int, depth: int, batch: int, dtype: torch.dtype, device: torch.device
) -> AttentionConfig:
    """Config of `mqa` over `queries` rows (positions times heads) and `keys` keys of one image."""
    return _choose(
        AttentionConfig,
        device,
        f"mqa/{dtype_name(dtype)}/b{batch}q{queries}p{keys}d{depth}",
        lambda: heuristics.attention(queries, keys, depth, batch, dtype.itemsize, *_device(device)[1:]),
    )


@lru_cache(maxsize=4096)
def projected_attention_config(
    positions: int, keys: int, depth: int, batch: int, dtype: torch.dtype, device: torch.device
) -> AttentionConfig:
    """Config of `mqa_projected` over `positions` rows, all heads of each, and `keys` keys of one image."""
    return _choose(
        AttentionConfig,
        device,
        f"mqa_projected/{dtype_name(dtype)}/b{batch}q{positions}p{keys}d{depth}",
        lambda: heuristics.projected_attention(positions, keys, depth, batch, dtype.itemsize, *_device(device)[1:]),
    )


@lru_cache(maxsize=4096)
def pool_config(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> PoolConfig:
    """Config of the global average pool of `shape` [N, C, H, W]."""
    return _choose(
        PoolConfig,
        device,
        f"pool/{dtype_name(dtype)}/{'x'.join(map(str, shape))}",
        lambda: heuristics.pool(shape[1], shape[2] * shape[3]),
    )


@lru_cache(maxsize=4096)
def training_depthwise_config(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> DepthwiseConfig:
    """Config of `bn_act_dwconv` with output `shape` [N, C, OH, OW]."""
    return _choose(
        DepthwiseConfig,
        device,
        f"bn_act_dwconv/{dtype_name(dtype)}/{'x'.join(map(str, shape))}/k{kernel[0]}s{stride[0]}",
        lambda: heuristics.training_depthwise(shape, kernel, stride, dtype.itemsize, _device(device)[1]),
    )


@lru_cache(maxsize=4096)
def depthwise_backward_config(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> PositionsConfig:
    """Config of `bn_act_dwconv_backward` with input `shape` [N, C, H, W]."""
    return _choose(
        PositionsConfig,
        device,
        f"bn_act_dwconv_backward/{dtype_name(dtype)}/{'x'.join(map(str, shape))}/k{kernel[0]}s{stride[0]}",
        lambda: heuristics.depthwise_backward(shape[1]),
    )


@lru_cache(maxsize=4096)
def training_gemm_config(
    op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, taps: int = 1
) -> GemmConfig:
    """Config of an [m, k] x [k, n] product of the training op `op`, with `taps` reductions of length k."""
    return _choose(
        GemmConfig,
        device,
        f"{op}/{dtype_name(dtype)}/m{m}n{n}k{k}t{taps}",
        lambda: heuristics.training_gemm(
            m, n, k, dtype.itemsize, *_device(device)[1:], taps=taps, backward=op.endswith("_backward")
        ),
    )


@lru_cache(maxsize=4096)
def split_config(
    op: str, m: int, outputs: int, columns: int, dtype: torch.dtype, device: torch.device, taps: int = 1
) -> SplitConfig:
    """Config of a weight's gradient [outputs, columns], `taps` of them, as sums over m pixels."""
    return _choose(
        SplitConfig,
        device,
        f"{op}/{dtype_name(dtype)}/weight/m{m}n{outputs}k{columns}t{taps}",
        lambda: heuristics.split(m, outputs, columns, dtype.itemsize, _device(device)[1], taps),
    )


@lru_cache(maxsize=4096)
def positions_config(
    op: str, positions: int, channels: int, dtype: torch.dtype, device: torch.device
) -> PositionsConfig:
    """Config of `bn_act` and its backward over `positions` pixels of all images."""
    return _choose(
        PositionsConfig,
        device,
        f"{op}/{dtype_name(dtype)}/p{positions}c{channels}",
        lambda: heuristics.positions(channels, op.endswith("_backward")),
    )


@lru_cache(maxsize=4096)
def attention_backward_config(
    queries: int, keys: int, depth: int, batch: int, dtype: torch.dtype, device: torch.device
) -> AttentionConfig:
    """Config of `mqa_backward` over `queries` rows (positions times heads) and `keys` keys of one image."""
    return _choose(
        AttentionConfig,
        device,
        f"mqa_backward/{dtype_name(dtype)}/b{batch}q{queries}p{keys}d{depth}",
        lambda: heuristics.attention_backward(queries, keys, batch, dtype.itemsize, _device(device)[1]),
    )
