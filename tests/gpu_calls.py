"""Calls for the tests of kernels on a device; importable, since processes are spawned that compile them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from training import CALLS, Training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpu_shapes import Call as Example
from gpu_shapes import blocks, calls

from mnv4_kernels.backends.cuda import KERNELS
from mnv4_kernels.ops.gpu import tune
from mnv4_kernels.testing import CASES, FUSED, Case

Draw = Callable[[torch.dtype, str], Example]


def _on(device: str, values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in values)


def _drawn(case: Case, dtype: torch.dtype, device: str) -> Example:
    return Example(case.op, str(case), _on(device, case.arguments(dtype, "channels_last", "channels_last")))


def _trained(call: Training, dtype: torch.dtype, device: str) -> Example:
    return Example(call.op, str(call), _on(device, call.arguments(dtype, "channels_last")))


def _trained_back(call: Training, dtype: torch.dtype, device: str) -> Example:
    arguments = call.arguments(dtype, "channels_last")
    generator = torch.Generator().manual_seed(3)
    if call.op == "bn_act":
        grad = torch.randn(arguments[0].shape, generator=generator).to(arguments[0])
        grad = grad.contiguous(memory_format=torch.channels_last)
        return Example(f"{call.op}_backward", f"{call} backward", _on(device, (grad, *arguments[:9])))
    *given, moments = arguments
    z, z_mean, _ = getattr(torch.ops.mnv4_kernels, call.op)(*arguments)
    grad = torch.randn(z.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    of_moments = (None,) * 4
    if moments:
        count = z.shape[1]
        of_moments = (torch.randn(count, generator=generator), torch.randn(count, generator=generator), z, z_mean)
    back = (grad, *of_moments, *given, True, True)
    return Example(f"{call.op}_backward", f"{call} backward", _on(device, back))


def _two_of_each(cases: tuple[Case, ...]) -> list[Case]:
    """The first two with images in them."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        if case.arguments()[0].numel():
            found.setdefault(case.op, []).append(case)
    return [case for group in found.values() for case in group[1:3]]


def _attended_back(case: Case, dtype: torch.dtype, device: str) -> Example:
    query, key, value, heads, scale = case.arguments(dtype, "channels_last", "channels_last")
    batch, _, *size = query.shape
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(batch, heads * value.shape[2], *size, generator=generator).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    return Example("mqa_backward", f"{case} backward", _on(device, (grad, query, key, value, heads, scale)))


#: two depthwise convolutions, an image's convolution and a map's, a product, the end of a block
_TRAINED = [
    *[call for call in CALLS if call.op == "bn_act_dwconv" and call.channels > 16][:2],
    next(call for call in CALLS if call.op == "bn_act_conv"),
    *[
        next(call for call in CALLS if call.op == op and call.channels > 16)
        for op in ("bn_act_conv", "bn_act_pwconv", "bn_act")
    ],
]
_ATTENTION = next(case for case in _two_of_each(CASES) if case.op == "mqa")

#: name -> draws a small call of a kernel, for a dtype and a device
SMALL_CALLS: dict[str, Draw] = {
    **{str(case): partial(_drawn, case) for case in (*_two_of_each(CASES), *FUSED) if case.op in KERNELS},
    **{str(call): partial(_trained, call) for call in _TRAINED},
    **{f"{call}_backward": partial(_trained_back, call) for call in _TRAINED},
    f"{_ATTENTION}_backward": partial(_attended_back, _ATTENTION),
}

#: ops whose kernels have configs of their own; the others launch theirs
FAMILIES = (
    "bn_act",
    "bn_act_backward",
    "bn_act_conv",
    "bn_act_conv_backward",
    "bn_act_dwconv",
    "bn_act_dwconv_backward",
    "conv_bn_act",
    "conv_pwconv",
    "dwconv_bn_act",
    "dwconv_pwconv",
    "head",
    "kv_downsample",
    "mqa",
    "mqa_backward",
    "mqa_projected",
    "pwconv_bn_act",
    # both products of a block in one launch
    "uib",
)


def model_examples(model: str, batch: int, dtype: torch.dtype, device: str, size: int) -> Iterator[Example]:
    """Every distinct op call of a model."""
    seen = set()
    for block in blocks(model, batch, size):
        for call in calls(block, dtype, device):
            shapes = tuple(tuple(v.shape) if torch.is_tensor(v) else str(v) for v in call.arguments)
            if (call.op, shapes) not in seen:
                seen.add((call.op, shapes))
                yield call


def family_examples(family: str, dtype: torch.dtype, device: str, small: bool) -> Iterator[Example]:
    """Calls of an op of which each has a kernel of its own: one of each depthwise geometry and each number of taps."""
    training = family.startswith(("bn_act", "mqa_backward"))
    drawn = [draw(dtype, "cpu") for draw in SMALL_CALLS.values()] if small or training else []
    own = [Example(call.op, call.role, _on(device, call.arguments)) for call in drawn if call.op == family]
    found = own if own else model_examples("hybrid_medium_075", 2, dtype, device, 128)
    seen = set()
    for call in found:
        if call.op == family:
            keys = " ".join(tune.build((call.op, call.arguments), {})[2])
            if family == "uib" and not keys.startswith("expand_project"):
                continue
            kind = tuple(re.findall(r"(?:k\d+s\d+|t\d+)\b", keys))
            if kind not in seen:
                seen.add(kind)
                yield call
            if small:
                return


def compile_candidates(family: str, dtype: str, part: int, parts: int, capability: int, processors: int) -> None:
    """Every `parts`-th candidate of a family into Triton's cache on disk; what does not compile is left out."""
    from mnv4_kernels.ops.gpu.offline import compile_launch
    from mnv4_kernels.ops.gpu.select import assume

    with assume(capability, processors):
        for call in family_examples(family, getattr(torch, dtype), "meta", small=False):
            for key, first in tune.build((call.op, call.arguments), {})[2].items():
                for config in tune.candidates(first)[part::parts]:
                    for launch in tune.build((call.op, call.arguments), {key: config})[1]:
                        try:
                            compile_launch(launch, capability)
                        # ptxas has its limits; the test that runs the config names it
                        except Exception as error:
                            print(f"{key} {config}: {error}", file=sys.stderr)
