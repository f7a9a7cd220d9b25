"""How the Triton kernels are registered: without importing Triton, with reasons, and with the references behind."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from mnv4_kernels.backends import cuda
from mnv4_kernels.ops._contract import REFERENCES


def test_every_op_with_a_kernel_has_a_contract_and_a_reference() -> None:
    assert set(cuda.KERNELS) <= set(REFERENCES)


@pytest.mark.parametrize("op", sorted(cuda.KERNELS))
def test_the_module_of_a_kernel_exists(op: str) -> None:
    assert importlib.util.find_spec(f"mnv4_kernels.ops.{cuda.KERNELS[op]}") is not None


def test_importing_the_package_and_asking_for_reasons_loads_no_kernel() -> None:
    program = (
        "import sys, mnv4_kernels; from mnv4_kernels.backends import cuda; cuda.reasons();"
        "from mnv4_kernels.ops.gpu import gate, heuristics, select;"
        "loaded = [name for name in sys.modules if name.startswith('mnv4_kernels') and 'triton_' in name];"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registration_makes_a_cuda_kernel_of_each_op_known_to_the_dispatcher() -> None:
    library = torch.library.Library("mnv4_triton_test", "DEF")
    library.define("mqa(Tensor query, Tensor key, Tensor value, int heads, float scale) -> Tensor")
    names = cuda.register(library, {"mqa": REFERENCES["mqa"], "an_op_of_another_device": REFERENCES["head"]})
    assert names == (["mqa"] if importlib.util.find_spec("triton") else [])
    has = torch._C._dispatch_has_kernel_for_dispatch_key("mnv4_triton_test::mqa", "CUDA")
    assert has == bool(names)


def test_without_triton_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    library = torch.library.Library("mnv4_no_triton_test", "DEF")
    library.define("mqa(Tensor query, Tensor key, Tensor value, int heads, float scale) -> Tensor")
    assert cuda.register(library, {"mqa": REFERENCES["mqa"]}) == []
    cuda.found_reasons.cache_clear()
    assert "Triton is not installed" in cuda.reasons()
    cuda.found_reasons.cache_clear()


def _attention(depth: int, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    key = torch.randn(1, 4, depth, dtype=dtype)
    return torch.randn(1, depth, 2, 2, dtype=dtype), key, key, 1, 1.0


def test_float64_and_wide_heads_are_declined_with_the_reason() -> None:
    assert cuda.unsupported("mqa", _attention(64)) == []
    (reason,) = cuda.unsupported("mqa", _attention(64, torch.float64))
    assert "not for torch.float64" in reason
    (reason,) = cuda.unsupported("mqa", _attention(192))
    assert reason.endswith("up to 128 wide, not for 192")


def test_one_depthwise_of_two_is_declined_with_the_reason() -> None:
    x, down, project = torch.randn(1, 8, 4, 4), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    arguments = (x, down, None, None, project, None, None, None, project, *geometry)
    (reason,) = cuda.unsupported("kv_downsample", arguments)
    assert "for two depthwise convolutions or none" in reason


def test_a_row_of_an_ops_list_of_backends_names_the_device_and_the_process() -> None:
    reasons = cuda.reasons_for("mqa", *_attention(64, torch.float64))
    assert "the tensors are on cpu; the Triton kernels run on cuda" in reasons
    assert any("not for torch.float64" in reason for reason in reasons)
    assert set(cuda.reasons()) <= set(reasons)


def test_a_switch_gives_cuda_calls_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "reasons", tuple)
    monkeypatch.setattr(cuda, "kernel", lambda op: lambda *arguments: f"kernel of {op}")
    run = cuda.implementation("mqa", REFERENCES["mqa"])
    assert run(*_attention(64)) == "kernel of mqa"
    arguments = _attention(64)
    for name in ("MNV4_KERNELS_DISABLE", "MNV4_KERNELS_DISABLE_MQA"):
        with monkeypatch.context() as switched:
            switched.setenv(name, "1")
            assert torch.equal(run(*arguments), REFERENCES["mqa"](*arguments))


def test_a_kernel_gets_dense_vectors_and_maps_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "reasons", tuple)
    monkeypatch.setattr(cuda, "kernel", lambda op: lambda *arguments: arguments)
    x, weight = torch.randn(2, 8, 3, 5)[:, :, :, ::2], torch.randn(8, 1, 3, 3)
    # as the gradient of a sum lies, and a column of a matrix
    scale, shift = torch.randn(1).expand(8), torch.randn(8, 2)[:, 1]
    run = cuda.implementation("dwconv_bn_act", REFERENCES["dwconv_bn_act"])
    found = run(x, weight, scale, shift, [1, 1], [1, 1, 1, 1], [1, 1], "relu")
    assert found[0] is x
    for mine, given in zip(found[2:4], (scale, shift), strict=True):
        assert mine.stride() == (1,)
        assert torch.equal(mine, given)


def test_a_device_that_is_too_old_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "reasons", lambda: ("the CUDA device is older than compute capability 8.0",))
    arguments = _attention(64)
    run = cuda.implementation("mqa", REFERENCES["mqa"])
    assert torch.equal(run(*arguments), REFERENCES["mqa"](*arguments))


def test_declined_arguments_get_the_reference() -> None:
    arguments = _attention(64, torch.float64)
    run = cuda.implementation("mqa", REFERENCES["mqa"])
    assert torch.equal(run(*arguments), REFERENCES["mqa"](*arguments))
