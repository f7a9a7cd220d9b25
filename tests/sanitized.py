"""Every kernel, a few ops and whole networks once, for a library built with sanitizers; `tests/sanitized.sh` runs it.

Results are judged elsewhere; here the compiler's checks are the judge. They see tensors and
packed weights of the ops to the byte, but not inside an engine's one block of memory: there
the fuzzed programs of `test_engine_fuzz.py` look for overlaps.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from training import CALLS, op_of, results_and_gradients

import mnv4_kernels as mk
from mnv4_kernels.backends import native
from mnv4_kernels.testing import CASES, forced_tier, tiers


def exercise_ops() -> None:
    """Each case of each op, in two layouts."""
    for case in CASES:
        for layout in ("contiguous", "sliced_channels_last"):
            getattr(torch.ops.mnv4_kernels, case.op)(*case.arguments(layout=layout))


def exercise_training() -> None:
    """Each training op forward and backward, in two layouts."""
    for call in CALLS:
        for layout in ("contiguous", "sliced_channels_last"):
            with torch.enable_grad():
                results_and_gradients(op_of(call), call.arguments(layout=layout))


def exercise_network(model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    """All shapes, dtypes and several threads through one engine."""
    for dtype in (torch.float32, torch.bfloat16):
        fast = mk.optimize(model, dtype)
        for shape in shapes:
            x = torch.randn(shape)
            assert fast(x).isfinite().all()
            fast.forward_features(x.contiguous(memory_format=torch.channels_last).bfloat16())

        def call(shape: tuple[int, ...], fast: mk.OptimizedNetwork = fast) -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = fast(torch.zeros(shape))
            return result

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(call, shapes))


def main() -> None:
    """Everything on every tier."""
    import timm

    assert native.available(), native.reasons()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    names = ("mobilenetv4_conv_small_035", "mobilenetv4_hybrid_medium_075", "mobilenetv4_conv_blur_medium")
    models = [timm.create_model(name).eval() for name in names]
    with torch.no_grad():
        for tier in tiers():
            with forced_tier(tier):
                exercise_ops()
                exercise_training()
                for model in models:
                    exercise_network(model, [(1, 3, 64, 64), (2, 3, 47, 33), (0, 3, 32, 32)])
            print(f"{tier}: clean", flush=True)


if __name__ == "__main__":
    main()
