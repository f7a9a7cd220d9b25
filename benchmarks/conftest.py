"""Options of the op suite: which model's shapes, how many images, how many threads."""

from __future__ import annotations

import pytest
import torch
from shapes import conv_shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", default="mobilenetv4_conv_small", help="the model of timm whose shapes are timed")
    parser.addoption("--batch", type=int, default=1, help="images")
    parser.addoption("--threads", type=int, default=2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = conv_shapes(metafunc.config.getoption("model"))
        metafunc.parametrize("shape", shapes, ids=lambda shape: shape.name)


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.config.getoption("threads"))
    value: int = request.config.getoption("batch")
    return value
