"""Launch configs for a device that nobody has tuned: pure functions of the shape.

The thresholds come from the offline table (registers and spills on sm_80, sm_90 and sm_100) and from
arithmetic on tiles, not from timings; a tuned file overrides every one of them.
"""

from __future__ import annotations

from dataclasses import replace

from .config import (
    AttentionConfig,
    DepthwiseConfig,
    DepthwiseGemmConfig,
    GemmConfig,
    PoolConfig,
    PositionsConfig,
    SplitConfig,
)
from .launch import cdiv, next_power_of_2

#: Multiprocessors and compute capability of the device that is assumed where none can be asked.
DEFAULT_MULTIPROCESSORS = 132
DEFAULT_CAPABILITY = 90

#: Devices of 99 KiB shared memory a program: Ampere, Ada and Blackwell outside the data centre.
CONSUMER_CAPABILITIES = (86, 87, 89, 120, 121)

#: Ceilings of one H100 that weigh a tile's costs against each other: bf16 product and copy as measured by the
#: project, L2 bandwidth as published microbenchmarks have it.
MATMUL_TFLOP_S = 790.0
COPY_GB_S = 3000.0
L2_GB_S = 5500.0

#: Bytes that one lane moves at once.
VECTOR_BYTES = 16


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one program may take."""
    if capability in CONSUMER_CAPABILITIES:
        return 99 * 1024
    return 163 * 1024 if capability < 90 else 227 * 1024


def channel_block(channels: int, limit: int = 64) -> int:
    """The block in {16, 32, 64} up to `limit` that covers `channels` with the least waste; the widest at a tie.

    16 channels of 2 bytes fill a 32-byte sector, so a narrow block loses no bandwidth.
    """
    blocks = [block for block in (64, 32, 16) if block <= limit]
    return min(blocks, key=lambda block: (cdiv(channels, block) * block, -block))


def _rows(out_height: int, most: int) -> int:
    """Output rows of a strip: least rows computed in vain, then the tallest strip, of at most `most` rows."""
    return min(range(1, most + 1), key=lambda rows: (cdiv(out_height, rows) * rows, -rows))


def depthwise(
    shape: tuple[int, ...],  # N, C, OH, OW
    kernel: tuple[int, int],
    stride: tuple[int, int],
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
) -> DepthwiseConfig:
    """One 16-byte vector a lane; strips as tall as registers allow, shorter where the device would idle."""
    batch, channels, out_h, out_w = shape
    block = channel_block(channels)
    warps = 4
    columns = max(1, warps * 32 * (VECTOR_BYTES // element_size) // block)
    # live in a lane: rows of accumulators, input rows of one kernel column, kernel_h weights
    most = 8 if kernel[0] <= 3 and stride[0] == 1 else (7 if stride[0] == 1 and kernel[0] <= 5 else 4)
    rows = _rows(out_h, min(most, out_h))
    while rows > 1:
        programs = cdiv(batch * cdiv(out_h, rows) * out_w, columns) * cdiv(channels, block)
        if programs >= 2 * multiprocessors:
            break
        rows = cdiv(rows, 2)
    return DepthwiseConfig(warps=warps, stages=1, rows=rows, columns=columns, channels=block)


def training_depthwise(
    shape: tuple[int, ...],  # N, C, OH, OW
    kernel: tuple[int, int],
    stride: tuple[int, int],
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
) -> DepthwiseConfig:
    """As `depthwise` for float32, whatever the input is: the normalised rows are kept as such."""
    return depthwise(shape, kernel, stride, max(4, element_size), multiprocessors)


def depthwise_backward(channels: int) -> PositionsConfig:
    """Sixteen elements a lane: a tile writes a row of sums for each tap, which fewer tiles make fewer of."""
    block, warps = channel_block(channels, 32), 4
    return PositionsConfig(warps=warps, stages=1, positions=warps * 32 * 16 // block, channels=block)


def _gemm_width(n: int, k: int, element_size: int) -> int:
    """Columns of a tile: a wasted column costs tensor-core time, a further tile reads A from L2 again."""

    def cost(width: int) -> float:
        tiles = cdiv(n, width)
        compute = 2.0 * tiles * width * k / (MATMUL_TFLOP_S * 1e12)
        traffic = element_size * (k * tiles / (L2_GB_S * 1e9) + (k + n) / (COPY_GB_S * 1e9))
        return max(compute, traffic)

    return min((256, 128, 64, 32, 16), key=lambda width: (cost(width), width))


def gemm(
    m: int,
    n: int,
    k: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
    taps: int = 1,
) -> GemmConfig:
    """The cheapest tile that still fills the device; reduction steps of 128 bytes, less where k is short."""
    if m <= 16:
        # the weight is the traffic: as many programs as there are 16-column tiles read it side by side
        return GemmConfig(warps=4, stages=4, block_m=16, block_n=16, block_k=256 // element_size, group_m=1)
    block_k = max(16, min(128 // element_size, next_power_of_2(k)))
    block_n = _gemm_width(n, k * taps, element_size)
    block_m = 128
    while block_m > 32 and cdiv(m, block_m) * cdiv(n, block_n) < multiprocessors:
        block_m //= 2
    while block_n > 32 and cdiv(m, block_m) * cdiv(n, block_n) < multiprocessors:
        block_n //= 2
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    stages = 3
    while stages > 1 and stages * (block_m + block_n) * block_k * element_size > shared_memory(capability):
        stages -= 1
    return GemmConfig(warps=warps, stages=stages, block_m=block_m, block_n=block_n, block_k=block_k)


def training_gemm(
    m: int,
    n: int,
    k: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
    taps: int = 1,
    backward: bool = False,
) -> GemmConfig:
    """As `gemm`, with at most 128 columns: an operand passes through registers on its way to being formed.

    On the way back two maps form it and the epilogue reads a third: 128 x 128 spill, and 128 x 64 with four warps.
    """
    config = gemm(m, n, k, element_size, multiprocessors, capability, taps)
    block_m, block_n = config.block_m, min(config.block_n, 128)
    if backward and block_n == 128:
        block_m = min(block_m, 64)
    if not backward and block_m == 32:
        # wider ones spill on sm_90, with four warps and with eight, with Triton 3.6 or with 3.9
        block_n = min(block_n, 64)
    # with four warps ptxas spills of forward tiles of 128 rows and few columns on sm_80 and sm_86, whatever the stages
    warps = 8 if block_m * block_n >= 128 * 64 or (block_m == 128 and not backward) else 4
    block_k = min(config.block_k, 128 // element_size)
    return replace(config, block_m=block_m, block_n=block_n, block_k=block_k, warps=warps)


def split(
    m: int,
    outputs: int,
    columns: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    taps: int = 1,
) -> SplitConfig:
    """Two programs a multiprocessor share the pixels; each takes eight blocks or more, since parts are joined."""
    block_n = max(16, min(128, next_power_of_2(outputs)))
    block_k = max(16, min(64, next_power_of_2(columns)))
    block_m = 128 // element_size
    tiles = cdiv(outputs, block_n) * cdiv(columns, block_k) * taps
    parts = max(1, min(cdiv(2 * multiprocessors, tiles), cdiv(m, 8 * block_m)))
    return SplitConfig(warps=4, stages=2, block_m=block_m, block_n=block_n, block_k=block_k, parts=parts)


def positions(channels: int, sums: bool) -> PositionsConfig:
    """Eight elements a lane; sixteen where a tile writes a row of each of its sums, which fewer tiles make fewer of."""
    block, warps = channel_block(channels), 4
    return PositionsConfig(warps=warps, stages=1, positions=warps * 32 * (16 if sums else 8) // block, channels=block)


def depthwise_gemm(
    shape: tuple[int, ...],  # N, C, OH, OW of the depthwise convolution
    n: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
) -> DepthwiseGemmConfig:
    """All output channels in one tile up to 256, because each further tile computes the depthwise again.

    Two rows halve the loads of the depthwise and share each weight tile. Beside 256 columns of float32 products
    32 positions of them spill, 16 do not; and those with four warps, since with eight ptxas spills to fit two programs.
    """
    batch, _, out_h, out_w = shape
    block_n = max(16, min(256, next_power_of_2(n)))
    rows = 1 if out_h == 1 else 2
    columns = 16 if element_size == 4 and block_n == 256 else 64
    while columns > 16 and cdiv(batch * cdiv(out_h, rows) * out_w, columns) * cdiv(n, block_n) < multiprocessors:
        columns //= 2
    warps = 8 if block_n >= 128 and columns > 16 else 4
    return DepthwiseGemmConfig(
        warps=warps, stages=1, rows=rows, columns=columns, block_n=block_n, block_k=64 // element_size
    )


def conv_pair(
    m: int,
    hidden: int,
    outputs: int,
    channels: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
) -> GemmConfig:
    """Whole hidden rows: 128 pixels of up to 128 channels, 64 of up to 256."""
    block_h = max(16, next_power_of_2(hidden))
    block_n = max(16, min(64, next_power_of_2(outputs)))
    block_k = max(16, min(128 // element_size, next_power_of_2(channels)))
    block_m = 128 if block_h <= 128 and element_size == 2 else 64
    while block_m > 16 and cdiv(m, block_m) < multiprocessors:
        block_m //= 2
    warps = 8 if block_m * block_h >= 64 * 128 else 4
    stages = 3
    # beside the pipeline lie the hidden rows and a tile of the second weight
    held = (block_m + block_n) * block_h * element_size
    while stages > 1 and held + stages * (block_m + block_h) * block_k * element_size > shared_memory(capability):
        stages -= 1
    return GemmConfig(warps=warps, stages=stages, block_m=block_m, block_n=block_n, block_k=block_k, group_m=1)


def expand_project(
    m: int,
    channels: int,
    hidden: int,
    outputs: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
) -> GemmConfig:
    """All outputs of up to 128 rows; `block_n` hidden channels at a time, from `block_k` channels of x at a time."""
    block_n = max(16, next_power_of_2(outputs))
    block_h = min(64 if block_n <= 128 and element_size == 2 else 32, max(16, next_power_of_2(hidden)))
    block_k = max(64 // element_size, channel_block(channels, 128 // element_size))
    # 128 rows of accumulators spill on sm_100, and on sm_80 beside operands of float32
    block_m = 64 if capability >= 100 or (element_size == 4 and capability < 90) else 128
    while block_m > 16 and cdiv(m, block_m) < multiprocessors:
        block_m //= 2
    stages = 3
    # beside the pipeline lie the hidden rows and a tile of the second weight
    held = (block_m + block_n) * block_h * element_size
    while stages > 1 and held + stages * (block_m + block_h) * block_k * element_size > shared_memory(capability):
        stages -= 1
    warps = 8 if block_m * block_n >= 64 * 128 else 4
    return GemmConfig(warps=warps, stages=stages, block_m=block_m, block_n=block_h, block_k=block_k, group_m=1)


def kv(m: int, depth: int, element_size: int, multiprocessors: int = DEFAULT_MULTIPROCESSORS) -> GemmConfig:
    """Two products of the whole depth; fewer positions a program where the maps are small."""
    block_n = max(16, next_power_of_2(depth))
    # 64 positions of float32 spill on the sm_80 family
    block_m = 64 if element_size == 2 else 32
    while block_m > 16 and cdiv(m, block_m) < multiprocessors:
        block_m //= 2
    warps = 4 if block_n <= 64 else 8
    return GemmConfig(warps=warps, stages=1, block_m=block_m, block_n=block_n, block_k=64 // element_size, group_m=1)


def attention(
    queries: int,
    keys: int,
    depth: int,
    batch: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
) -> AttentionConfig:
    """All keys in one block up to 256; several query tiles a program once every multiprocessor has work."""
    block_keys = max(16, min(256, next_power_of_2(keys)))
    # keys, values and a tile of scores lie in shared memory; with half of it free a second program fits
    while block_keys > 64 and block_keys * max(16, next_power_of_2(depth)) * 2 * element_size > (
        shared_memory(capability) // 2
    ):
        block_keys //= 2
    # 64 x 128 scores of float32 products spill on sm_80
    block_queries = 64 if block_keys * element_size <= 256 else 32
    tiles = 1
    while tiles < 8 and batch * cdiv(queries, block_queries * tiles * 2) >= 2 * multiprocessors:
        tiles *= 2
    return AttentionConfig(warps=4, stages=1, queries=block_queries, tiles=tiles, keys=block_keys)


def attention_backward(
    queries: int,
    keys: int,
    batch: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
) -> AttentionConfig:
    """Keys pass in blocks of 64: two of them with their gradients, scores and their derivative are alive at once."""
    block_keys = max(16, min(64, next_power_of_2(keys)))
    block_queries = 64 if element_size == 2 else 32
    tiles = 1
    while tiles < 64 and batch * cdiv(keys, block_keys) * cdiv(queries, block_queries * tiles * 2) >= multiprocessors:
        tiles *= 2
    # four warps spill on sm_80
    return AttentionConfig(warps=8, stages=1, queries=block_queries, tiles=tiles, keys=block_keys)


def projected_attention(
    positions: int,
    keys: int,
    depth: int,
    batch: int,
    element_size: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    capability: int = DEFAULT_CAPABILITY,
) -> AttentionConfig:
    """As `attention`, with 256 output channels of accumulators beside the scores: eight warps, fewer rows.

    `keys` 0: the output's weight does not fit beside keys and values, so that each part gets a launch of its own.
    """
    if element_size == 4 and capability in CONSUMER_CAPABILITIES:
        return AttentionConfig(warps=8, stages=1, queries=16, tiles=1, keys=0)
    config = attention(positions, keys, depth, batch, element_size, multiprocessors, capability)
    rows = 64 if config.keys <= 128 and element_size == 2 else 32
    while rows > 16 and batch * cdiv(positions, rows) < multiprocessors:
        rows //= 2
    return AttentionConfig(warps=8, stages=1, queries=rows, tiles=1, keys=config.keys)


def pool(channels: int, positions: int) -> PoolConfig:
    """A few positions at a time, one image a program."""
    return PoolConfig(
        warps=4, stages=1, positions=min(32, max(4, next_power_of_2(positions))), channels=channel_block(channels)
    )
