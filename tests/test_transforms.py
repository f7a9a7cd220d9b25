"""Autocast, torch.func, fake and meta tensors, tracing: patched models and ops do what unpatched ones do, or say no."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import SMALL, create, images, tensors_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

import mnv4_kernels as mk
from mnv4_kernels import functional
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.testing import Case, cases, outputs

pytestmark = pytest.mark.usefixtures("one_thread")


def autocast(dtype: torch.dtype) -> Callable[[nn.Module, torch.Tensor], Any]:
    def call(model: nn.Module, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype):
            return model(x)

    return call


def autocast_of_another_device(model: nn.Module, x: torch.Tensor) -> Any:
    with torch.autocast("cuda", torch.float16):
        return model(x)


def over_images(model: nn.Module, x: torch.Tensor) -> Any:
    return vmap(lambda image: model(image[None])[0])(x)


def other_parameters(model: nn.Module, x: torch.Tensor) -> Any:
    return functional_call(model, {name: value * 1.01 for name, value in model.named_parameters()}, (x,))


def gradients(model: nn.Module, x: torch.Tensor) -> Any:
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    found = grad(lambda values: functional_call(model, values, (x,)).square().mean())(parameters)
    return list(found.values())


def directional(model: nn.Module, x: torch.Tensor) -> Any:
    return list(jvp(model, (x,), (torch.ones_like(x),)))


def traced(model: nn.Module, x: torch.Tensor) -> Any:
    return torch.jit.trace(model, x, check_trace=False)(x)


def on_meta(model: nn.Module, x: torch.Tensor) -> Any:
    return copy.deepcopy(model).to("meta")(x.to("meta"))


def with_fakes(model: nn.Module, x: torch.Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


USES: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "autocast bfloat16": autocast(torch.bfloat16),
    "autocast float16": autocast(torch.float16),
    "autocast of another device": autocast_of_another_device,
    "vmap": over_images,
    "functional_call": other_parameters,
    "grad": gradients,
    "jvp": directional,
    "jit.trace": traced,
    "meta": on_meta,
    "FakeTensorMode": with_fakes,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_patched_model_does_what_the_unpatched_one_does(use: Callable[..., Any]) -> None:
    pytest.importorskip("timm")
    model = create(SMALL)
    twin = copy.deepcopy(model)
    mk.patch(model)
    with torch.no_grad():
        actual, expected = tensors_of(use(model, images())), tensors_of(use(twin, images()))
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        if type(theirs) is torch.Tensor and not theirs.is_meta:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


#: a small call of each op
CASES = (
    cases.dwconv(8, (5, 5), act="relu", batch=3),
    cases.conv(3, 8, (5, 5), act="relu", batch=3),
    cases.pwconv(8, 16, (5, 4), gamma=True, residual=True, batch=3),
    cases.kv_downsample(8, 16, 16, (5, 5), batch=3),
    cases.mqa(2, 16, 16, 4, (2, 2), batch=3),
    cases.head(8, 16, 10, (3, 3), batch=3),
)


def op_of(case: Case) -> Any:
    return getattr(torch.ops.mnv4_kernels, case.op).default


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
class TestOps:
    def test_vmap_over_images_is_the_batch(self, case: Case) -> None:
        arguments = case.arguments()
        batch = arguments[0].shape[0]
        mapped = [
            isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[0] == batch for value in arguments
        ]
        split = [value.unsqueeze(1) if inside else value for value, inside in zip(arguments, mapped, strict=True)]
        axes = tuple(0 if inside else None for inside in mapped)
        found = outputs(vmap(lambda *values: op_of(case)(*values), axes)(*split))
        for mine, theirs in zip(found, outputs(op_of(case)(*arguments)), strict=True):
            torch.testing.assert_close(mine.squeeze(1), theirs, rtol=1e-5, atol=1e-5)

    def test_a_trace_holds_the_op(self, case: Case) -> None:
        first, *rest = case.arguments()
        graph = torch.jit.trace(lambda x: op_of(case)(x, *rest), first, check_trace=False)
        assert f"mnv4_kernels::{case.op}" in str(graph.inlined_graph)
        for mine, theirs in zip(outputs(graph(first)), outputs(op_of(case)(first, *rest)), strict=True):
            assert torch.equal(mine, theirs)

    def test_autocast_of_another_device_changes_nothing(self, case: Case) -> None:
        with torch.autocast("cuda", torch.float16):
            found = outputs(op_of(case)(*case.arguments()))
        for mine, theirs in zip(found, outputs(op_of(case)(*case.arguments())), strict=True):
            assert torch.equal(mine, theirs)


def test_every_op_has_a_rule_for_autocast_on_both_devices() -> None:
    for name in REFERENCES:
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mnv4_kernels::{name}", f"Autocast{device}"), name


def test_forward_mode_goes_through_the_references() -> None:
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(16, 8, 1, 1)
    tangent = torch.randn_like(x)
    found = jvp(lambda value: functional.pwconv_bn_act(value, weight, act="silu"), (x,), (tangent,))
    expected = jvp(lambda value: nn.functional.silu(torch.conv2d(value, weight)), (x,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
