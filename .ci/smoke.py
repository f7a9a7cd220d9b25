"""Runs every op of an installed wheel in every tier against its reference, and its backend; torch only, no timm."""

from __future__ import annotations

import torch
import torch._inductor.utils

from mnv4_kernels.backends import native
from mnv4_kernels.environment import OPS
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.ops.support import backends_of
from mnv4_kernels.testing import fused
from mnv4_kernels.testing.tiers import forced_tier, tiers


def cases() -> dict[str, list[torch.Tensor | object]]:
    """Arguments of each op's C++ implementation, small and odd."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 13, 9)
    per_channel = torch.rand(24) + 0.5
    depthwise = torch.randn(24, 1, 3, 3)
    geometry: list[object] = [[2, 2], [1, 1, 1, 1], [1, 1]]
    return {
        "dwconv_bn_act": [x, depthwise, per_channel, per_channel, *geometry, "relu"],
        "pwconv_bn_act": [x, torch.randn(40, 24, 1, 1), None, torch.randn(40), "gelu", None, None],
        "conv_bn_act": [x, torch.randn(40, 24, 3, 3), None, None, *geometry, "relu6", True],
        "mqa": [torch.randn(2, 64, 5, 7), torch.randn(2, 12, 16), torch.randn(2, 12, 16), 4, 0.25],
        "head": [x, torch.randn(48, 24, 1, 1), None, None, "relu", torch.randn(10, 48), torch.randn(10)],
        "kv_downsample": [
            x,
            *(depthwise, per_channel, per_channel, torch.randn(16, 24, 1, 1)),
            *(depthwise, per_channel, per_channel, torch.randn(16, 24, 1, 1)),
            *geometry,
        ],
        "uib": [*fused.uib(16, 48, 16, (7, 7), skip=True).arguments()],
        "mobile_attention": [*fused.mobile_attention(32, 4, 16, 16, (8, 6)).arguments()],
    }


def check_backend() -> None:
    """torch.compile finds the backend by its name, in the metadata of what is installed."""
    layers = [(torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU6()) for _ in range(3)]
    model, x = torch.nn.Sequential(*(module for layer in layers for module in layer)).eval(), torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        compiled = torch.compile(model, backend="mnv4_kernels")
        result, (code,) = torch._inductor.utils.run_and_get_code(compiled, x)
        torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4)
    assert "torch.ops.mnv4_kernels.subnetwork" in code


def main() -> None:
    """Raises on the first difference."""
    assert native.available(), native.reasons()
    assert set(cases()) == {op for op in OPS if "cpp" in [row.name for row in backends_of(op)]}
    for tier in tiers():
        with forced_tier(tier):
            for name, arguments in cases().items():
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mnv4_kernels::{name}", "CPU"), name
                result = getattr(torch.ops.mnv4_kernels, name)(*arguments)
                torch.testing.assert_close(result, REFERENCES[name](*arguments), rtol=1e-4, atol=1e-4)
    check_backend()
    print(f"torch {torch.__version__}: {len(cases())} ops agree in {', '.join(tiers())}")


if __name__ == "__main__":
    main()
