"""What a kernel moves and computes, and the least time that takes: the model behind the gate.

Times are predictions from bytes, FLOPs and ceilings. They rank plans of one block against each other;
as absolute times they are floors that no run has confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import AttentionConfig, DepthwiseConfig, DepthwiseGemmConfig, GemmConfig
from .launch import cdiv, next_power_of_2


@dataclass(frozen=True)
class Ceilings:
    """What a device can do. The defaults are one H100 in bfloat16.

    Copy and matrix product are measured figures of the project; L1 is 128 bytes a cycle and
    multiprocessor at 1.7 GHz, FMA the data sheet's float32 rate, L2 and the cost of a kernel inside a
    CUDA graph published microbenchmarks. `benchmarks/gpu_campaign.py` measures them on a device.
    """

    copy_gb_s: float = 3000.0
    l2_gb_s: float = 5500.0
    l1_gb_s: float = 28000.0
    matmul_tflop_s: float = 790.0
    fma_tflop_s: float = 60.0
    launch_us: float = 1.5
    multiprocessors: int = 132
    l2_bytes: int = 50 * 2**20

    def for_element_size(self, element_size: int) -> Ceilings:
        """The same device with tf32 products where elements have 4 bytes: half the rate."""
        if element_size == 2:
            return self
        return Ceilings(**{**self.__dict__, "matmul_tflop_s": self.matmul_tflop_s / 2})


@dataclass(frozen=True)
class Cost:
    """One launch: bytes at each level, operations, and how many programs share them."""

    memory: float
    l2: float
    l1: float
    matmul: float
    fma: float
    programs: int

    def us(self, ceilings: Ceilings) -> float:
        """Predicted microseconds: the slowest level, slowed where programs can't fill the device, plus the launch.

        Matrix and vector operations add up: a program alternates between them.
        """
        if not self.programs:
            return 0.0
        share = min(1.0, self.programs / ceilings.multiprocessors)
        waves = self.programs / ceilings.multiprocessors
        if waves > 1:
            share = waves / cdiv(self.programs, ceilings.multiprocessors)
        compute = self.matmul / (ceilings.matmul_tflop_s * 1e6) + self.fma / (ceilings.fma_tflop_s * 1e6)
        on_chip = max(self.l1 / (ceilings.l1_gb_s * 1e3), compute) / share
        # a quarter of the multiprocessors can saturate memory
        off_chip = max(self.memory / (ceilings.copy_gb_s * 1e3), self.l2 / (ceilings.l2_gb_s * 1e3))
        return max(on_chip, off_chip / min(1.0, 4 * share)) + ceilings.launch_us


def _taps(kernel: tuple[int, int]) -> int:
    return kernel[0] * kernel[1]


def _loads_per_output(kernel: tuple[int, int], stride: tuple[int, int], rows: int) -> float:
    """Input elements that a lane loads for one output: each kernel column loads every row of the strip."""
    return kernel[1] * ((rows - 1) * stride[0] + kernel[0]) / rows


def depthwise(
    shape: tuple[int, ...],  # N, C, OH, OW
    kernel: tuple[int, int],
    stride: tuple[int, int],
    element_size: int,
    config: DepthwiseConfig,
) -> Cost:
    """`dwconv_bn_act`."""
    batch, channels, out_h, out_w = shape
    outputs = batch * channels * out_h * out_w
    inputs = outputs * stride[0] * stride[1]
    strips = cdiv(out_h, config.rows)
    computed = batch * channels * strips * config.rows * out_w
    memory = element_size * (inputs + outputs)
    # the strips above and below read the halo again, from L2
    halo = max(0, kernel[0] - stride[0]) * (strips - 1) * batch * channels * out_w * stride[1] * element_size
    return Cost(
        memory=memory,
        l2=memory + halo,
        l1=computed * (_loads_per_output(kernel, stride, config.rows) + 1) * element_size,
        matmul=0.0,
        # a conversion beside each loaded element
        fma=computed * (2.0 * _taps(kernel) + _loads_per_output(kernel, stride, config.rows)),
        programs=cdiv(batch * strips * out_w, config.columns) * cdiv(channels, config.channels),
    )


def gemm(m: int, n: int, k: int, element_size: int, config: GemmConfig, residual: bool = False, taps: int = 1) -> Cost:
    """`pwconv_bn_act`, and `conv_bn_act` with `taps` reductions of length k."""
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    y = m * n * (2 if residual else 1)
    operands = tiles_n * m * k * taps + tiles_m * n * k * taps
    padded_k = cdiv(k, config.block_k) * config.block_k * taps
    return Cost(
        memory=element_size * (m * k + n * k * taps + y),
        l2=element_size * (operands + y),
        l1=element_size * (operands + y),
        matmul=2.0 * tiles_m * config.block_m * tiles_n * config.block_n * padded_k,
        fma=0.0,
        programs=tiles_m * tiles_n,
    )


def conv(
    batch: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    out: tuple[int, int],
    taps: int,
    element_size: int,
    config: GemmConfig,
) -> Cost:
    """`conv_bn_act`: the taps of a pixel come from L2, memory gives the map once."""
    m = batch * out[0] * out[1]
    cost = gemm(m, outputs, channels, element_size, config, taps=taps)
    x = batch * channels * size[0] * size[1]
    return replace(cost, memory=float(element_size * (x + m * outputs + outputs * channels * taps)))


def conv_pair(
    batch: int,
    channels: int,
    hidden: int,
    outputs: int,
    size: tuple[int, int],
    out: tuple[int, int],
    taps: int,
    element_size: int,
    config: GemmConfig,
    residual: bool = False,
) -> Cost:
    """`conv_pwconv`: both products of a tile of pixels, the hidden rows on chip."""
    m = batch * out[0] * out[1]
    tiles = cdiv(m, config.block_m)
    x = batch * channels * size[0] * size[1]
    y = m * outputs * (2 if residual else 1)
    weights = hidden * channels * taps + outputs * hidden
    padded_k = cdiv(channels, config.block_k) * config.block_k * taps
    block_h = max(16, next_power_of_2(hidden))
    padded_n = cdiv(outputs, config.block_n) * config.block_n
    through = m * channels * taps + tiles * weights + y
    return Cost(
        memory=element_size * (x + weights + y),
        l2=element_size * through,
        l1=element_size * through,
        matmul=2.0 * tiles * config.block_m * block_h * (padded_k + padded_n),
        fma=0.0,
        programs=tiles,
    )


def expand_project(
    m: int,
    channels: int,
    hidden: int,
    outputs: int,
    element_size: int,
    config: GemmConfig,
    residual: bool = False,
) -> Cost:
    """Both products of a block without dw_mid: each part of the hidden channels reads the rows of x again, from L1."""
    tiles, parts = cdiv(m, config.block_m), cdiv(hidden, config.block_n)
    rows = tiles * config.block_m
    y = m * outputs * (2 if residual else 1)
    weights = hidden * (channels + outputs)
    padded_c = cdiv(channels, config.block_k) * config.block_k
    block_n = max(16, next_power_of_2(outputs))
    return Cost(
        memory=element_size * (m * channels + weights + y),
        l2=element_size * (m * channels + tiles * weights + y),
        l1=element_size * (parts * m * channels + tiles * weights + y),
        matmul=2.0 * rows * parts * config.block_n * (padded_c + block_n),
        fma=0.0,
        programs=tiles,
    )


def depthwise_gemm(
    shape: tuple[int, ...],  # N, C, OH, OW of the depthwise convolution
    n: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    element_size: int,
    config: DepthwiseGemmConfig,
    residual: bool = False,
) -> Cost:
    """`dwconv_pwconv`: the depthwise is computed once for each tile of output channels."""
    batch, channels, out_h, out_w = shape
    strips = cdiv(out_h, config.rows)
    columns = batch * strips * out_w
    tiles_m, tiles_n = cdiv(columns, config.columns), cdiv(n, config.block_n)
    m = tiles_m * config.columns * config.rows
    x = batch * channels * out_h * out_w * stride[0] * stride[1]
    y = batch * out_h * out_w * n * (2 if residual else 1)
    weights = tiles_m * n * channels
    loads = _loads_per_output(kernel, stride, config.rows)
    hidden = m * channels * tiles_n
    halo = max(0, kernel[0] - stride[0]) * (strips - 1) * batch * channels * out_w * stride[1]
    return Cost(
        memory=element_size * (x + n * channels + y),
        l2=element_size * (tiles_n * (x + halo) + weights + y),
        l1=element_size * (hidden * loads + weights + y),
        matmul=2.0 * m * tiles_n * config.block_n * cdiv(channels, config.block_k) * config.block_k,
        fma=hidden * (2.0 * _taps(kernel) + loads),
        programs=tiles_m * tiles_n,
    )


def attention(batch: int, queries: int, keys: int, depth: int, element_size: int, config: AttentionConfig) -> Cost:
    """`mqa` over `queries` rows (positions times heads) an image."""
    programs = batch * cdiv(queries, config.queries * config.tiles)
    padded = batch * cdiv(queries, config.queries) * config.queries * cdiv(keys, config.keys) * config.keys
    rows = batch * queries * depth * 2
    return Cost(
        memory=element_size * (rows + batch * keys * depth * 2),
        l2=element_size * (rows + programs * keys * depth * 2),
        l1=element_size * (rows + programs * keys * depth * 2),
        matmul=4.0 * padded * depth,
        # scale, maximum, exponential, sum: about eight operations a score
        fma=8.0 * padded,
        programs=programs,
    )


def projected_attention(
    batch: int,
    positions: int,
    keys: int,
    heads: int,
    depth: int,
    channels: int,
    outputs: int,
    element_size: int,
    config: AttentionConfig,
    residual: bool = False,
) -> Cost:
    """`mqa_projected`: each program reads its rows of x, all keys and both weights, the rows once a head."""
    tiles = batch * cdiv(positions, config.queries)
    padded = tiles * config.queries
    block_n = max(16, next_power_of_2(outputs))
    block_p = max(16, config.keys)
    x = batch * positions * channels
    y = batch * positions * outputs * (2 if residual else 1)
    weights = heads * depth * (channels + outputs)
    held = keys * depth * 2
    return Cost(
        memory=element_size * (x + y + weights + batch * held),
        l2=element_size * (x + y + tiles * (weights + held)),
        l1=element_size * (x * heads + y + tiles * (weights + held)),
        matmul=2.0 * padded * heads * depth * (channels + 2 * block_p + block_n),
        fma=8.0 * padded * heads * block_p,
        programs=tiles,
    )


def kv(
    batch: int,
    channels: int,
    size: tuple[int, int],
    positions: int,
    depth: int,
    taps: int,
    element_size: int,
    config: GemmConfig,
) -> Cost:
    """`kv_downsample`: x once, both depthwise convolutions and both products."""
    m = batch * positions
    tiles_m = cdiv(m, config.block_m)
    x = batch * channels * size[0] * size[1]
    weights = 2 * depth * channels
    return Cost(
        memory=element_size * (x + weights + 2 * m * depth),
        l2=element_size * (x + tiles_m * weights + 2 * m * depth),
        l1=element_size * (m * channels * taps + tiles_m * weights + 2 * m * depth),
        matmul=4.0 * tiles_m * config.block_m * config.block_n * channels,
        fma=2.0 * m * channels * (2 * taps + 1) if taps > 1 else 0.0,
        programs=tiles_m,
    )
