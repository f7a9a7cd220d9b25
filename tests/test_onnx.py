"""torch.onnx.export of a patched model gives what the unpatched one gives, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import HYBRID, SMALL, create, images

import mnv4_kernels as mk

pytest.importorskip("timm")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [SMALL, pytest.param(HYBRID, marks=pytest.mark.slow)])
def test_a_patched_model_is_exported_as_timms(name: str, tmp_path: Path) -> None:
    model, x = create(name), images()
    expected = model(x).detach()
    mk.patch(model)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"ONNX has no such ops, timm's own path is exported"):
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-3)
    assert type(model).__name__ == "FusedMobileNetV3"
