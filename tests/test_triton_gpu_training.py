"""On a device: results and gradients of the training kernels, and a patched model's step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("timm", reason="timm is not installed")

from models import HYBRID, SMALL, double_of, images, ops_called
from torch import nn
from training import CALLS, Training, assert_as_exact_as, op_of, plain, results_and_gradients, widened
from training_models import assert_trains_alike, smooth

import mnv4_kernels as mk
from mnv4_kernels.ops._contract import REFERENCES
from mnv4_kernels.testing import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _there(arguments: Any) -> list[Any]:
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_and_gradients_are_as_exact_as_plain_torch(call: Training, dtype: torch.dtype) -> None:
    arguments = _there(call.arguments(dtype, "channels_last"))
    ours = results_and_gradients(op_of(call), arguments)
    baseline = results_and_gradients(plain(call), arguments)
    assert_as_exact_as(ours, baseline, results_and_gradients(plain(call), widened(arguments)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_attention_are_as_exact_as_plain_torch(dtype: torch.dtype) -> None:
    for case in (cases.mqa(4, 64, 64, 64, (16, 16), batch=3), cases.mqa(3, 24, 40, 150, (5, 7))):
        arguments = _there(case.arguments(dtype, "channels_last"))
        ours = results_and_gradients(torch.ops.mnv4_kernels.mqa.default, arguments)
        baseline = results_and_gradients(REFERENCES["mqa"], arguments)
        assert_as_exact_as(ours, baseline, results_and_gradients(REFERENCES["mqa"], widened(arguments)), dtype)


@pytest.mark.parametrize("call", [CALLS[4], CALLS[18], CALLS[21], CALLS[28]], ids=str)
def test_the_same_input_gives_the_same_bits(call: Training) -> None:
    arguments = _there(call.arguments(torch.bfloat16, "channels_last"))
    first = results_and_gradients(op_of(call), arguments)
    second = results_and_gradients(op_of(call), arguments)
    for once, again in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_gradients_of_a_model_are_as_exact_as_eagers(name: str) -> None:
    # not `cudnn.allow_tf32`, which raises once another test has set this newer flag
    flags: Any = torch.backends.cudnn
    before, flags.conv.fp32_precision = flags.conv.fp32_precision, "ieee"
    try:
        assert_trains_alike(smooth(name).cuda(), images(4, 3, 64, 64).cuda())
    finally:
        flags.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_under_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    model = smooth("mobilenetv4_conv_small").cuda()
    x, labels = images(8, 3, 96, 96).cuda(), torch.arange(8, device="cuda")
    exact = double_of(copy.deepcopy(model))
    nn.functional.cross_entropy(exact(x.double()), labels).backward()
    twin = copy.deepcopy(model)
    mk.patch(twin)
    errors = []
    for net in (model, twin):
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

        def step(net: nn.Module = net, scaler: Any = scaler) -> None:
            with torch.autocast("cuda", dtype):
                loss = nn.functional.cross_entropy(net(x).float(), labels)
            scaler.scale(loss).backward()

        called = ops_called(step)
        assert ("bn_act_dwconv_backward" in called) is (net is twin)
        scaler.unscale_(optimizer)
        pairs = zip(net.parameters(), exact.parameters(), strict=True)
        errors.append(sum((p.grad.double() - q.grad).square().sum().item() for p, q in pairs) ** 0.5)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        scaler.step(optimizer)
        assert any(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert errors[1] <= 2 * errors[0]
