"""Every MobileNet-V4 of timm, and what `timm.create_model` can make of one, is as exact optimized as in eager."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from engines import assert_optimized_is_as_exact, assert_twice_as_exact_as_eager, batches, needs_engine
from models import HYBRID, NAMES, SMALL, assert_same_strides, create, double_of, images

import mnv4_kernels as mk
from mnv4_kernels.testing import KNOWN_TIERS, LAYOUTS, forced_tier, lay_out, tiers

pytest.importorskip("timm")
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_engine]

LOW_PRECISION = [torch.bfloat16, torch.float16]


@cache
def pair(name: str) -> tuple[Any, mk.OptimizedNetwork]:
    """A model and its optimized twin; neither is changed by its users."""
    model = create(name)
    return model, mk.optimize(model, strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_as_exact_as_timms(name: str) -> None:
    assert_optimized_is_as_exact(create(name), batches(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_as_exact_at_the_sizes_that_the_model_is_made_for(name: str) -> None:
    config = create(name).default_cfg
    # a size for tests of its own is what most of them have
    for size in {config[which] for which in ("input_size", "test_input_size") if which in config}:
        assert_optimized_is_as_exact(create(name, size=size[-1]), batches(1, *size, count=2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_other_weights_are_as_exact(name: str, seed: int) -> None:
    assert_optimized_is_as_exact(create(name, seed=20 + seed), batches(2, 3, 64, 64))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", HYBRID, "mobilenetv4_conv_blur_medium"])
def test_low_precision_is_as_exact_as_timms_in_that_precision(name: str, dtype: torch.dtype) -> None:
    assert_optimized_is_as_exact(create(name), batches(2, 3, 64, 64), dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_as_exact_in_low_precision(name: str, dtype: torch.dtype) -> None:
    assert_optimized_is_as_exact(create(name), batches(2, 3, 96, 96), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("tier", KNOWN_TIERS)
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_every_tier_is_as_exact(name: str, tier: str, dtype: torch.dtype) -> None:
    if tier not in tiers():
        pytest.skip(f"this processor or build has no {tier}")
    with forced_tier(tier):
        assert_optimized_is_as_exact(create(name), batches(2, 3, 64, 48), dtype)


def test_an_engine_follows_a_change_of_tier() -> None:
    model, fast = pair(SMALL)
    for tier in [*tiers(), *reversed(tiers())]:
        with forced_tier(tier):
            assert_twice_as_exact_as_eager(fast, model, batches(2, 3, 64, 48))


@pytest.mark.parametrize("size", [(32, 96), (65, 47), (33, 33), (224, 40), (96, 160), (1, 1), (5, 7)])
@pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_medium"])
def test_odd_oblong_and_tiny_images_are_as_exact(name: str, size: tuple[int, int]) -> None:
    model, fast = pair(name)
    assert_twice_as_exact_as_eager(fast, model, batches(2, 3, *size, count=4))


@pytest.mark.parametrize("size", [(33, 33), (47, 65), (64, 96)])
@pytest.mark.parametrize("name", ["mobilenetv4_conv_aa_medium", "mobilenetv4_conv_blur_medium"])
def test_anti_aliased_models_are_as_exact_at_odd_sizes(name: str, size: tuple[int, int]) -> None:
    model, fast = pair(name)
    assert_twice_as_exact_as_eager(fast, model, batches(2, 3, *size))


@pytest.mark.parametrize("name", ["mobilenetv4_conv_aa_medium", SMALL])
def test_an_image_too_small_for_the_network_is_an_error_as_in_eager(name: str) -> None:
    model, fast = pair(name)
    x = images(1, 3, 3, 9) if "_aa_" in name else images(1, 3, 0, 64)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"too small|at least|empty|zero|greater than"):
            model(x)
        with pytest.raises(RuntimeError, match="`x`"):
            fast(x)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_any_batch_is_as_exact(name: str, batch: int) -> None:
    model, fast = pair(name)
    assert_twice_as_exact_as_eager(fast, model, batches(batch, 3, 64, 64, count=2))


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_an_empty_batch_gives_empty_results(name: str) -> None:
    _, fast = pair(name)
    with torch.no_grad():
        assert fast(images(0, 3, 64, 64)).shape == (0, 1000)
        assert fast.forward_features(images(0, 3, 64, 64)).shape == (0, {SMALL: 336, HYBRID: 720}[name], 2, 2)


OPTIONS: list[dict[str, Any]] = [
    {"num_classes": 0},
    {"num_classes": 7},
    {"in_chans": 1},
    {"in_chans": 4},
    {"in_chans": 15},
    {"in_chans": 16},
    {"in_chans": 24},
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
def test_options_are_taken_entirely(name: str, options: dict[str, Any]) -> None:
    assert_optimized_is_as_exact(create(name, **options), batches(2, options.get("in_chans", 3), 64, 64))


@pytest.mark.parametrize("size", [(63, 50), (64, 64), (37, 96)])
def test_tensorflow_padding_follows_the_size(size: tuple[int, int]) -> None:
    model = create(HYBRID, pad_type="same")
    assert_optimized_is_as_exact(model, batches(2, 3, *size))


@pytest.mark.parametrize("size", [(64, 64), (47, 65), (32, 32), (20, 100)])
@pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_aa_medium"])
def test_forward_features_gives_the_last_map(name: str, size: tuple[int, int]) -> None:
    model, fast = pair(name)
    if "_aa_" in name and min(size) < 32:
        # average pools need two pixels
        for net, message in ((model, "Output size is too small"), (fast, "`x` must be large enough for the network")):
            with pytest.raises(RuntimeError, match=message):
                net.forward_features(images(2, 3, *size))
        return
    assert_twice_as_exact_as_eager(fast, model, batches(2, 3, *size), call=lambda net, x: net.forward_features(x))


@pytest.mark.parametrize("size", [(64, 64), (47, 65), (32, 32)])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_features_only_models_give_their_maps_at_every_output_stride(
    name: str, output_stride: int, size: tuple[int, int]
) -> None:
    model = create(name, features_only=True, output_stride=output_stride)
    assert_optimized_is_as_exact(model, batches(2, 3, *size))


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (4,), (0, 1, 2, 3, 4)])
def test_features_only_models_give_the_maps_that_were_asked_for(out_indices: tuple[int, ...]) -> None:
    model = create(SMALL, features_only=True, out_indices=out_indices)
    fast = assert_optimized_is_as_exact(model, batches(2, 3, 64, 64))
    assert len(fast(images())) == len(out_indices)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 4, 24])
def test_the_input_may_lie_in_memory_in_any_way(layout: str, dtype: torch.dtype, channels: int) -> None:
    fast = mk.optimize(create(SMALL, in_chans=channels))
    x = images(2, channels, 33, 48).to(dtype)
    with torch.no_grad():
        laid_out = lay_out(x, layout)
        before = laid_out.clone()
        actual, expected = fast(laid_out), fast(laid_out.contiguous())
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    assert torch.equal(laid_out, before)


@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
def test_maps_come_out_in_the_inputs_memory_format(x_format: torch.memory_format) -> None:
    model = create(SMALL, features_only=True)
    fast = mk.optimize(model)
    x = images().contiguous(memory_format=x_format)
    with torch.no_grad():
        assert_same_strides(fast(x), model(x))


def test_a_patched_model_is_optimized_as_an_unpatched_one() -> None:
    model, fast = pair(SMALL)
    patched = create(SMALL)
    mk.patch(patched)
    with torch.no_grad():
        assert torch.equal(mk.optimize(patched)(images()), fast(images()))
    assert type(patched) is not type(model)


def test_a_model_in_low_precision_is_optimized_from_its_own_weights() -> None:
    model = create(SMALL).bfloat16()
    fast = mk.optimize(model)
    with torch.no_grad():
        exact = double_of(model)(images().double())
        error = torch.linalg.vector_norm(fast(images()) - exact) / torch.linalg.vector_norm(exact)
    # computed in float32: nothing of bfloat16's 4e-3 remains
    assert error < 2e-6


def test_nan_and_infinities_pass_through_as_in_eager() -> None:
    model, fast = pair(SMALL)
    x = images(3, 3, 64, 64)
    x[1, 0, 5, 5] = float("nan")
    with torch.no_grad():
        eager, actual = model(x), fast(x)
    assert bool(actual[1].isnan().all())
    assert bool(eager[1].isnan().all())
    assert bool(actual[[0, 2]].isfinite().all())
