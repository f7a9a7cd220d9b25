"""Every config, compiled for GPUs that are not there: a spill or too much shared memory fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from mnv4_kernels.ops.gpu import offline
from mnv4_kernels.ops.gpu.config import GemmConfig
from mnv4_kernels.ops.gpu.launch import Launch, needs_int64
from mnv4_kernels.ops.gpu.select import assume

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

#: one launch of each kernel, at shapes where registers are tight
FAMILIES = (
    "bn_act",
    "bn_act_backward",
    "bn_act_conv",
    "bn_act_conv_backward",
    "bn_act_dwconv",
    "bn_act_dwconv_backward",
    "bn_act_pwconv",
    "bn_act_pwconv_backward",
    "bn_act_stem",
    "bn_act_stem_backward",
    "conv_bn_act",
    "conv_pwconv",
    "stem",
    "dwconv_bn_act",
    "dwconv_pwconv",
    "expand_project",
    "head",
    "kv_downsample",
    "mqa",
    "mqa_backward",
    "pwconv_bn_act",
)

TRAINING = tuple(name for name in FAMILIES if name.startswith("bn_act") or name.endswith("_backward"))


def _nhwc(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)


def _launches(family: str) -> list[Launch]:
    from mnv4_kernels.ops.bn_act import triton_bn_act as end
    from mnv4_kernels.ops.bn_act import triton_bn_act_backward as end_backward
    from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv as dense
    from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv_backward as dense_backward
    from mnv4_kernels.ops.bn_act_dwconv import triton_bn_act_dwconv as training
    from mnv4_kernels.ops.bn_act_dwconv import triton_bn_act_dwconv_backward as training_backward
    from mnv4_kernels.ops.bn_act_pwconv import triton_bn_act_pwconv as product
    from mnv4_kernels.ops.bn_act_pwconv import triton_bn_act_pwconv_backward as product_backward
    from mnv4_kernels.ops.conv_bn_act import triton_conv_bn_act as conv
    from mnv4_kernels.ops.conv_pwconv import triton_conv_pwconv as pair
    from mnv4_kernels.ops.dwconv_bn_act import triton_dwconv_bn_act as depthwise
    from mnv4_kernels.ops.dwconv_pwconv import triton_dwconv_pwconv as fused
    from mnv4_kernels.ops.head import triton_head as head
    from mnv4_kernels.ops.kv_downsample import triton_kv_downsample as kv
    from mnv4_kernels.ops.mqa import triton_mqa as attention
    from mnv4_kernels.ops.mqa import triton_mqa_backward as attention_backward
    from mnv4_kernels.ops.mqa_projected import triton_mqa_projected as projected
    from mnv4_kernels.ops.pwconv_bn_act import triton_pwconv_bn_act as pointwise
    from mnv4_kernels.ops.uib import triton_expand_project as products

    def channels(count: int) -> torch.Tensor:
        return torch.empty(count, device="meta")

    same = ([1, 1], [2, 2, 2, 2], [1, 1])
    down = (_nhwc(160, 1, 3, 3), channels(160), channels(160), _nhwc(64, 160, 1, 1))
    key = torch.empty(64, 64, 64, dtype=torch.bfloat16, device="meta")
    x, wide = _nhwc(64, 160, 16, 16), _nhwc(64, 640, 16, 16)
    image = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    two = ([2, 2], [1, 1, 1, 1], [1, 1])

    def norm(count: int) -> tuple[Any, ...]:
        return (*(channels(count) for _ in range(4)), 1e-5, "silu")

    def through(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (z, channels(z.shape[1]), channels(z.shape[1]), z, channels(z.shape[1]))

    raw = (None, None, None, None, 0.0, "none")
    weight, filters, stem = _nhwc(640, 1, 5, 5), _nhwc(192, 48, 3, 3), _nhwc(32, 3, 3, 3)
    map_, half, first = _nhwc(64, 48, 64, 64), _nhwc(64, 192, 32, 32), _nhwc(64, 32, 112, 112)
    project = _nhwc(160, 640, 1, 1)
    builds: dict[str, Callable[[], tuple[object, list[Launch]]]] = {
        "bn_act": lambda: end.build(x, *norm(160), channels(160), channels(64), x),
        "bn_act_backward": lambda: end_backward.build(x, x, *norm(160), channels(160), channels(64)),
        "bn_act_conv": lambda: dense.build(map_, *norm(48), filters, *two, True),
        "bn_act_conv_backward": lambda: dense_backward.build(
            *through(half), map_, *norm(48), filters, *two, True, True
        ),
        "bn_act_dwconv": lambda: training.build(wide, *norm(640), weight, *same, True),
        "bn_act_dwconv_backward": lambda: training_backward.build(
            *through(wide), wide, *norm(640), weight, *same, True, True
        ),
        "bn_act_pwconv": lambda: product.build(wide, *norm(640), project, True),
        "bn_act_pwconv_backward": lambda: product_backward.build(*through(x), wide, *norm(640), project, True, True),
        "bn_act_stem": lambda: dense.build(image, *raw, stem, *two, True, True),
        "bn_act_stem_backward": lambda: dense_backward.build(*through(first), image, *raw, stem, *two, False, True),
        "conv_bn_act": lambda: conv.build(
            _nhwc(64, 48, 64, 64), _nhwc(192, 48, 3, 3), channels(192), channels(192), *two, "relu"
        ),
        "conv_pwconv": lambda: pair.build(
            _nhwc(64, 32, 128, 128), _nhwc(128, 32, 3, 3), channels(128), channels(128), *two, "relu",
            _nhwc(48, 128, 1, 1), channels(48), channels(48), "none", None, None,
        ),
        "stem": lambda: conv.build(image, _nhwc(32, 3, 3, 3), channels(32), channels(32), *two, "relu"),
        "dwconv_bn_act": lambda: depthwise.build(
            wide, _nhwc(640, 1, 5, 5), channels(640), channels(640), *same, "relu"
        ),
        "dwconv_pwconv": lambda: fused.build(
            wide, _nhwc(640, 1, 5, 5), channels(640), channels(640), *same, "gelu",
            _nhwc(160, 640, 1, 1), channels(160), channels(160), "none", channels(160), x,
        ),
        "expand_project": lambda: (
            x,
            products.build(
                x, _nhwc(640, 160, 1, 1), channels(640), channels(640), "gelu", _nhwc(160, 640, 1, 1), channels(160),
                channels(160), channels(160), x, torch.empty_like(x),
            ),
        ),
        "head": lambda: head.build(
            _nhwc(64, 960, 7, 7), _nhwc(1280, 960, 1, 1), channels(1280), channels(1280), "relu",
            _nhwc(1000, 1280, 1, 1)[:, :, 0, 0], channels(1000),
        ),
        "kv_downsample": lambda: kv.build(x, *down, *down, *two),
        "mqa": lambda: attention.build(_nhwc(64, 256, 16, 16), key, key, 4, 0.125),
        "mqa_backward": lambda: attention_backward.build(
            _nhwc(64, 256, 16, 16), _nhwc(64, 256, 16, 16), key, key, 4, 0.125
        ),
        "mqa_projected": lambda: projected.build(
            x, _nhwc(256, 160, 1, 1), None, None, key, key, _nhwc(160, 256, 1, 1), channels(160), x, 4, 0.125
        ),
        "pwconv_bn_act": lambda: pointwise.build(
            wide, _nhwc(160, 640, 1, 1), channels(160), channels(160), "relu", channels(160), x
        ),
    }  # fmt: skip
    return builds[family]()[1]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in TRAINING else []) for name in FAMILIES]
)
def test_the_heuristic_config_of_a_kernel_neither_spills_nor_overflows_shared_memory(
    family: str, capability: int
) -> None:
    with assume(capability):
        for launch in _launches(family):
            used = offline.resources(launch, capability)
            assert not used.problems(), f"{launch.kernel.__name__} {launch.config}"
            assert 0 < used.registers <= 255


def test_a_config_that_spills_is_seen() -> None:
    (launch,) = _launches("pwconv_bn_act")
    crowded = GemmConfig(warps=4, stages=2, block_m=256, block_n=128, block_k=64)
    constants = launch.constants | {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64}
    spilling = Launch(launch.kernel, launch.grid, launch.arguments, constants, crowded)
    (problem,) = offline.resources(spilling, 90).problems()
    assert problem.startswith("spills ")


def test_too_much_shared_memory_is_seen() -> None:
    assert offline.Resources(100, 0, 228 * 1024).problems() == ["takes 233472 bytes of shared memory, more than 232448"]
    assert offline.Resources(100, 0, 100 * 1024).problems(offline.CONSUMER_SHARED_LIMIT)
    assert not offline.Resources(100, 0, 99 * 1024).problems(offline.CONSUMER_SHARED_LIMIT)


def test_many_images_and_keys_lie_along_the_one_axis_of_a_grid_that_takes_them() -> None:
    from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv_backward as dense
    from mnv4_kernels.ops.mqa import triton_mqa as attention
    from mnv4_kernels.ops.mqa import triton_mqa_backward as backward
    from mnv4_kernels.ops.mqa_projected import triton_mqa_projected as projected

    def built(batch: int) -> list[Launch]:
        key = torch.empty(batch, 144, 64, dtype=torch.bfloat16, device="meta")
        query, x = _nhwc(batch, 512, 12, 12), _nhwc(batch, 160, 12, 12)
        weights = (_nhwc(512, 160, 1, 1), None, None, key, key, _nhwc(160, 512, 1, 1), None, None)
        return [
            *attention.build(query, key, key, 8, 0.125)[1],
            *backward.build(query, query, key, key, 8, 0.125)[1],
            *projected.build(x, *weights, 8, 0.125)[1],
        ]

    wide, geometry = _nhwc(8, 512, 7, 7), ([1, 1], [1, 1, 1, 1], [1, 1])
    raw = (None, None, None, None, 0.0, "none")
    weight = dense.build(wide, None, None, None, None, wide, *raw, _nhwc(512, 512, 3, 3), *geometry, False, True)[1]
    for launch in (*built(256), *built(70_000), *weight):
        assert launch.grid[0] < 2**31
        assert all(size < 2**16 for size in launch.grid[1:]), launch.kernel.__name__


def test_a_view_of_a_large_tensor_is_addressed_with_64_bits() -> None:
    def image(*stride: int) -> torch.Tensor:
        return torch.empty_strided((256, 3, 224, 224), stride, device="meta")

    assert not needs_int64(image(3 * 224 * 224, 224 * 224, 224, 1))
    # three channels of 64
    assert needs_int64(image(224 * 224 * 64 * 3, 224 * 224, 224, 1))


@pytest.mark.parametrize(("family", "instruction"), [("pwconv_bn_act", "wgmma.mma_async"), ("mqa", "wgmma.mma_async")])
def test_a_hopper_binary_multiplies_with_warp_groups(family: str, instruction: str) -> None:
    (launch,) = _launches(family)
    assert instruction in offline.compile_launch(launch, 90).asm["ptx"]


def test_the_depthwise_reads_sixteen_bytes_at_a_time_and_each_row_once_a_kernel_column() -> None:
    (launch,) = _launches("dwconv_bn_act")
    ptx = offline.compile_launch(launch, 90).asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    assert all(".v4." in line for line in loads)
    rows = launch.config.rows + 4
    # rows of x, five taps of one kernel column, scale and shift as float32
    assert len(loads) == rows + 5 + 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_narrow_forward_tiles_of_float32_training_do_not_spill(capability: int) -> None:
    from mnv4_kernels.ops.bn_act_conv import triton_bn_act_conv as dense

    image = torch.empty(16, 3, 224, 224, device="meta")
    filters = torch.empty(32, 3, 3, 3, device="meta").to(memory_format=torch.channels_last)
    geometry = ([2, 2], [1, 1, 1, 1], [1, 1])
    with assume(capability):
        launch = dense.build(image, None, None, None, None, 0.0, "none", filters, *geometry, True, True)[1][0]
        assert (launch.config.block_m, launch.config.block_n) == (128, 32)
        assert not offline.resources(launch, capability).problems()


def test_no_kernel_has_a_default_argument() -> None:
    import importlib

    from triton.runtime.jit import JITFunction

    from mnv4_kernels.backends.cuda import KERNELS

    modules = [f"mnv4_kernels.ops.{name}" for name in KERNELS.values()]
    modules += [f"mnv4_kernels.ops.gpu.{name}" for name in ("depthwise", "device", "normalise", "reduction", "taps")]
    found = [value for name in modules for value in vars(importlib.import_module(name)).values()]
    functions = {value.fn.__name__: value.fn for value in found if isinstance(value, JITFunction)}
    assert len(functions) > 20
    # Triton 3.6 takes a string for none of the language's values
    assert not [name for name, function in functions.items() if function.__defaults__]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize("options", [[], ["--train", "--batches", "8", "256"]], ids=["inference", "training"])
def test_every_config_of_the_twelve_models_neither_spills_nor_overflows(capability: int, options: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_offline.py"), "--capabilities", str(capability), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
