"""Every MobileNet-V4 of timm, and what `timm.create_model` can make of one, is as exact patched as unpatched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    HYBRID,
    NAMES,
    SMALL,
    assert_as_exact,
    assert_patched_is_as_exact,
    convolutions,
    create,
    double_of,
    images,
    ops_called,
)

import mnv4_kernels as mk

timm = pytest.importorskip("timm")
AA, BLUR = "mobilenetv4_conv_aa_medium", "mobilenetv4_conv_blur_medium"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_list_of_models_is_timms() -> None:
    assert set(NAMES) == set(timm.list_models("mobilenetv4_*"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_as_exact_as_timms(name: str) -> None:
    model = create(name)
    report = assert_patched_is_as_exact(model, images())
    anti_aliased = "_aa_" in name or "_blur_" in name
    assert report.replaced
    assert bool(report.partly) == anti_aliased
    assert {row.cls for row in report.left_alone} <= {"AvgPool2d", "BlurPool2d"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["input_size", "test_input_size"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_as_exact_at_the_size_that_the_model_is_made_for(name: str, which: str) -> None:
    size = timm.create_model(name).default_cfg.get(which)
    if size is None:
        pytest.skip(f"{name} has no {which}")
    assert_patched_is_as_exact(create(name, size=size[-1]), images(1, *size))


@pytest.mark.parametrize("name", NAMES)
def test_strict_patching_takes_every_model_but_the_anti_aliased(name: str) -> None:
    model = create(name)
    if "_aa_" in name or "_blur_" in name:
        with pytest.raises(mk.PatchError, match=r"aa: anti-aliasing pool"):
            mk.patch(model, strict=True)
    else:
        assert not mk.patch(model, strict=True).left_alone


@pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_blur_medium"])
def test_verify_passes_on_a_patched_model(name: str) -> None:
    model = create(name)
    mk.patch(model)
    report = mk.verify(model, images(1, 3, 96, 64))
    assert not report.failures
    assert len(report.checks) == sum(len(stage) for stage in model.blocks) + 3
    assert [check.name for check in report.checks][:: len(report.checks) - 1] == ["stem", "(whole model)"]


@pytest.mark.parametrize("name", [SMALL, HYBRID, AA, BLUR])
def test_a_network_runs_as_one_program(name: str) -> None:
    model = create(name)
    mk.patch(model)
    with torch.no_grad():
        assert list(dict.fromkeys(ops_called(lambda: model(images())))) == [
            "engine_create",
            "engine_pack",
            "engine_run",
        ]
        # packed once, when the plan is made
        assert ops_called(lambda: model(images())) == ["engine_run"]


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [(AA, "stride", 1), (AA, "kernel_size", 1), (BLUR, "stride", 1), (BLUR, "pad_mode", "reflect")],
)
def test_a_change_of_an_anti_aliasing_pool_is_seen(name: str, attribute: str, value: Any) -> None:
    model = create(name)
    mk.patch(model)
    with torch.no_grad():
        before = model(images())
        setattr(first_pool(model), attribute, value)
        assert not torch.equal(model(images()), before)
    assert_as_exact_as_unpatched(model)


def test_a_blur_pools_filter_edited_and_its_hooks_are_seen() -> None:
    model = create(BLUR)
    mk.patch(model)
    pool = first_pool(model)
    with torch.no_grad():
        before = model(images())
        pool.filt.mul_(1.5)
        assert not torch.equal(model(images()), before)
        seen: list[Any] = []
        pool.register_forward_hook(lambda *_: seen.append(1))
        model(images())
    assert len(seen) == 1
    assert_as_exact_as_unpatched(model)


def first_pool(model: torch.nn.Module) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(".aa"))


def assert_as_exact_as_unpatched(model: torch.nn.Module) -> None:
    with torch.no_grad():
        actual = model(images())
        mk.unpatch(model)
        assert_as_exact(actual, model(images()), double_of(model)(images().double()), convolutions(model))


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_a_trunk_runs_as_one_op_a_convolution_or_less(name: str) -> None:
    model = create(name)
    mk.patch(model)
    with torch.no_grad():
        model.forward_features(images())
        called = ops_called(lambda: model.forward_features(images()))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    # kv_downsample is two or four convolutions; the head's is not run
    assert convolutions - 1 - 4 * called.count("mqa") <= len(called) < convolutions
    assert called[0] == "conv_bn_act"


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", [SMALL, "mobilenetv4_conv_medium", HYBRID])
def test_features_only_models_give_their_maps_at_every_output_stride(name: str, output_stride: int) -> None:
    model = create(name, features_only=True, output_stride=output_stride)
    report = assert_patched_is_as_exact(model, images())
    assert not report.left_alone
    assert not report.partly


def test_features_at_expansions_are_taken_by_hooks_and_stay_right() -> None:
    model = create(HYBRID, features_only=True, feature_location="expansion", out_indices=(1, 2, 3))
    assert_patched_is_as_exact(model, images())


OPTIONS: list[dict[str, Any]] = [
    {"num_classes": 0},
    {"num_classes": 7},
    {"in_chans": 1},
    {"in_chans": 4},
    {"act_layer": "relu6"},
    {"act_layer": "hard_swish"},
    {"act_layer": "silu"},
    {"act_layer": "gelu"},
    {"act_layer": "gelu_tanh"},
    {"drop_path_rate": 0.2},
    {"drop_rate": 0.3},
    {"pad_type": "same"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, *options.items())))
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_models_with_options_are_replaced_entirely(name: str, options: dict[str, Any]) -> None:
    model = create(name, **options)
    report = assert_patched_is_as_exact(model, images(2, options.get("in_chans", 3), 64, 64))
    assert not report.left_alone
    assert not report.partly


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "fast", ""])
def test_a_head_with_another_pool_keeps_timms_path(pool: str) -> None:
    model = create(SMALL, global_pool=pool, num_classes=1000 if pool else 0)
    report = assert_patched_is_as_exact(model, images())
    assert bool(report.partly) == (pool != "avg")


@pytest.mark.parametrize("size", [(32, 96), (65, 47), (33, 33), (224, 40)])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_odd_and_oblong_images_work(name: str, size: tuple[int, int]) -> None:
    assert_patched_is_as_exact(create(name), images(1, 3, *size))


@pytest.mark.parametrize("pad_type", ["", "same"])
def test_tensorflow_padding_follows_the_size(pad_type: str) -> None:
    model = create(HYBRID, pad_type=pad_type)
    for size in ((64, 64), (63, 50)):
        with torch.no_grad():
            eager, exact = mk.unpatch(model)(images(1, 3, *size)), double_of(model)(images(1, 3, *size).double())
            mk.patch(model)
            assert_as_exact(model(images(1, 3, *size)), eager, exact)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_any_batch_works(name: str, batch: int) -> None:
    assert_patched_is_as_exact(create(name), images(batch, 3, 64, 64))


@pytest.mark.parametrize("name", [SMALL, "mobilenetv4_conv_medium"])
def test_an_empty_batch_gives_empty_logits(name: str) -> None:
    model = create(name)
    mk.patch(model)
    with torch.no_grad():
        assert model(images(0, 3, 64, 64)).shape == (0, 1000)


def test_an_empty_batch_passes_through_attention() -> None:
    model = create(HYBRID)
    mk.patch(model)
    with torch.no_grad():
        assert model(images(0, 3, 64, 64)).shape == (0, 1000)


FORMATS = [(torch.contiguous_format, torch.contiguous_format), (torch.channels_last, torch.contiguous_format)]
FORMATS += [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.channels_last)]

CALLS = {
    "features": lambda model, x: model.forward_features(x),
    "pre_logits": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "intermediates": lambda model, x: model.forward_intermediates(x),
    "last two": lambda model, x: model.forward_intermediates(x, indices=2, intermediates_only=True),
    "stop early": lambda model, x: model.forward_intermediates(
        x, indices=[1, 2], stop_early=True, intermediates_only=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("model_format", "input_format"), FORMATS)
def test_maps_come_out_as_eager_lays_them_out(
    call: str, model_format: torch.memory_format, input_format: torch.memory_format
) -> None:
    model = create(HYBRID).to(memory_format=model_format)
    assert_patched_is_as_exact(model, images().contiguous(memory_format=input_format), CALLS[call])


@pytest.mark.parametrize(("model_format", "input_format"), FORMATS)
def test_feature_extractors_lay_their_maps_out_as_eager_does(
    model_format: torch.memory_format, input_format: torch.memory_format
) -> None:
    model = create(SMALL, features_only=True).to(memory_format=model_format)
    assert_patched_is_as_exact(model, images().contiguous(memory_format=input_format))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_low_precision_models_are_as_exact_as_timms(name: str, dtype: torch.dtype) -> None:
    model = create(name).to(dtype)
    assert_patched_is_as_exact(model, images().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_weights_that_are_not_packed_give_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnv4_kernels.modules.folding.native.available", lambda: False)
    assert_patched_is_as_exact(create(name).to(dtype), images().to(dtype))


def test_the_references_alone_are_as_exact() -> None:
    code = (
        "import sys; sys.modules['mnv4_kernels._C'] = None; import torch; torch.set_num_threads(1);"
        "from models import HYBRID, assert_patched_is_as_exact, create, images;"
        "from mnv4_kernels.backends import native; assert not native.available();"
        "assert not assert_patched_is_as_exact(create(HYBRID), images()).left_alone"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(mk.__file__).parents[1])])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300)


def test_pruned_models_keep_working() -> None:
    model = create(SMALL)
    model.prune_intermediate_layers([2])
    assert_patched_is_as_exact(model, images(), lambda model, x: model.forward_features(x))


def test_reset_classifier_after_patching_is_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        model(images())
        model.reset_classifier(5)
        y = model(images())
        eager, exact = mk.unpatch(model)(images()), double_of(model)(images().double())
    assert_as_exact(y, eager, exact)
