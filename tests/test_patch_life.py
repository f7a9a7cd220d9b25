"""A patched model lives as an unpatched one does: copied, saved, loaded, trained, edited, and given back exactly."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import HYBRID, SMALL, assert_as_exact, convolutions, create, double_of, images
from torch import nn

import mnv4_kernels as mk
from mnv4_kernels.modules import DropIn

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")


def assert_follows_its_parameters(model: nn.Module, x: torch.Tensor | None = None) -> None:
    """What the patched `model` computes now is what timm computes with the parameters that it has now."""
    x = images() if x is None else x
    with torch.no_grad():
        actual = model(x)
        timm_copy = mk.unpatch(copy.deepcopy(model))
        assert_as_exact(actual, timm_copy(x), timm_copy.double()(x.double()), roundings=convolutions(model))


def anatomy(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything by which a model may be told from another: classes, attributes, identities, order."""
    return [
        (name, id(module), type(module), list(vars(module)), *({key: id(value) for key, value in part.items()},))
        for name, module in model.named_modules()
        for part in (module._parameters, module._buffers, module._modules, module._forward_hooks)
    ]


@pytest.mark.parametrize("name", [SMALL, HYBRID, "mobilenetv4_conv_blur_medium"])
def test_unpatch_gives_back_the_very_model(name: str) -> None:
    model = create(name)
    before, x = anatomy(model), images()
    with torch.no_grad():
        expected = model(x)
        mk.patch(model)
        model(x)
        assert mk.unpatch(model) is model
        assert anatomy(model) == before
        assert torch.equal(model(x), expected)


def test_patching_keeps_parameters_names_classes_and_hooks() -> None:
    model = create(HYBRID)
    parameters = dict(model.named_parameters())
    blocks = dict(model.named_modules())
    classes = {name: type(module) for name, module in blocks.items()}
    keys = list(model.state_dict())
    handle = model.blocks[1][0].register_forward_hook(lambda *_: None)
    mk.patch(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is blocks[name] for name, module in model.named_modules())
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert handle.id in model.blocks[1][0]._forward_hooks


@pytest.mark.parametrize("whole", [True, False], ids=["as a whole", "by blocks"])
def test_a_block_that_is_used_twice_runs_twice(whole: bool) -> None:
    model = create()
    model.blocks[2][2] = model.blocks[2][1]
    if not whole:
        # a head that keeps its map: the network is then run block by block
        model.flatten = nn.Identity()
        model.classifier = nn.Flatten()
    mk.patch(model)
    assert_follows_its_parameters(model)


def test_patching_twice_changes_nothing_and_reports_the_same() -> None:
    model = create(SMALL)
    first = mk.patch(model)
    before = anatomy(model)
    assert mk.patch(model) == first
    assert anatomy(model) == before


def test_unpatching_an_unpatched_model_changes_nothing() -> None:
    model = create(SMALL)
    before = anatomy(model)
    mk.unpatch(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("function", [mk.patch, mk.unpatch, mk.refresh])
def test_what_is_no_module_is_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got dict"):
        function({})


def test_verify_and_explain_refuse_what_is_no_module() -> None:
    for function in (mk.verify, mk.explain):
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got str"):
            function("model", images())  # type: ignore[operator]


def test_verify_refuses_what_it_cannot_judge() -> None:
    model = create(SMALL)
    with pytest.raises(ValueError, match="must be patched"):
        mk.verify(model, images())
    mk.patch(model)
    with pytest.raises(ValueError, match="must hold at least one image"):
        mk.verify(model, images(0, 3, 64, 64))
    with pytest.raises(TypeError, match=r"`x` must be a tensor \[N, C, H, W\], got list"):
        mk.verify(model, [images()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`x` must have shape \[N, C, H, W\], got \(3, 64, 64\)"):
        mk.verify(model, images()[0])
    with pytest.raises(TypeError, match="`x` must have the model's dtype, float32, got bfloat16"):
        mk.verify(model, images().bfloat16())
    with pytest.raises(ValueError, match="`x` must be on the model's device, cpu, got meta"):
        mk.verify(model, images().to("meta"))
    with pytest.raises(ValueError, match="must be in eval mode"):
        mk.verify(model.train(), images())


def test_verify_raises_when_a_block_is_wrong() -> None:
    model = create(SMALL)
    mk.patch(model)
    block = model.blocks[2][1]
    # a fault that only the drop-in has: the plan's own parameters are off
    body = type(block)._mnv4_body

    class Faulty(type(block)):  # type: ignore[misc]
        def _mnv4_body(self, key: str) -> Any:
            found = body(self, key)
            found.residual = not found.residual
            return found

    block.__class__ = Faulty
    with pytest.raises(mk.VerificationError, match=r"blocks\.2\.1.*FAILED(?s:.*)largest error"):
        mk.verify(model, images())


def test_a_model_without_known_blocks_is_left_alone_with_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    before = anatomy(model)
    with pytest.warns(UserWarning, match="nothing to replace in Sequential"):
        report = mk.patch(model)
    assert anatomy(model) == before
    assert [row.cls for row in report.left_alone] == ["Conv2d", "ReLU"]
    assert not report.notes


def test_strict_patching_of_an_unknown_model_raises() -> None:
    with pytest.raises(mk.PatchError, match="not in a block that a rule knows"):
        mk.patch(nn.Sequential(nn.Conv2d(3, 4, 3)), strict=True)


def test_a_strict_patch_that_fails_changes_nothing() -> None:
    model = create("mobilenetv4_conv_aa_medium")
    before = anatomy(model)
    with pytest.raises(mk.PatchError, match="left the model as it was"):
        mk.patch(model, strict=True)
    assert anatomy(model) == before


def test_strict_patching_in_train_mode_says_that_train_mode_is_timms() -> None:
    with pytest.raises(mk.PatchError, match="train mode"):
        mk.patch(create(SMALL).train(), strict=True)


def test_a_patch_that_fails_halfway_leaves_the_model_as_it_was() -> None:
    model = create(SMALL)

    class Stubborn(type(model.blocks[3][0].pw_exp)):  # type: ignore[misc]
        """Its class can't be changed."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise RuntimeError("not me")
            super().__setattr__(name, value)

    stubborn = model.blocks[3][0].pw_exp
    object.__setattr__(stubborn, "__class__", Stubborn)
    from mnv4_kernels.patching import rules

    before = anatomy(model)
    rules.RULES[Stubborn] = rules.RULES[Stubborn.__mro__[1]]
    try:
        with pytest.raises(RuntimeError, match="not me"):
            mk.patch(model)
    finally:
        del rules.RULES[Stubborn]
    assert anatomy(model) == before


def test_patched_is_undone_after_the_block_and_after_an_error() -> None:
    model = create(SMALL)
    before = anatomy(model)
    with mk.patched(model) as report:
        assert report.replaced
        assert isinstance(model, DropIn)
    assert anatomy(model) == before
    with pytest.raises(KeyError), mk.patched(model):
        raise KeyError
    assert anatomy(model) == before


def test_patched_keeps_what_was_patched_before() -> None:
    model = create(SMALL)
    mk.patch(model.blocks[2])
    with mk.patched(model):
        assert isinstance(model, DropIn)
    assert not isinstance(model, DropIn)
    assert isinstance(model.blocks[2][0], DropIn)


def test_a_part_of_a_model_can_be_patched() -> None:
    model = create(HYBRID)
    with torch.no_grad():
        eager, exact = model(images()), double_of(model)(images().double())
        mk.patch(model.blocks)
        assert_as_exact(model(images()), eager, exact, roundings=convolutions(model))
    assert not isinstance(model, DropIn)


def test_deep_copies_are_independent() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        model(images())
        twin = copy.deepcopy(model)
        assert torch.equal(twin(images()), model(images()))
        twin.blocks[2][0].pw_exp.conv.weight.mul_(2)
        assert not torch.equal(twin(images()), model(images()))
    assert_follows_its_parameters(twin)
    assert_follows_its_parameters(model)


def test_pickles_carry_no_folded_weights_and_come_back_patched() -> None:
    model = create(HYBRID)
    mk.patch(model)
    plain = len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(images())
        saved = pickle.dumps(model)
        assert abs(len(saved) - plain) < 1000
        loaded = pickle.loads(saved)
        assert isinstance(loaded, DropIn)
        assert torch.equal(loaded(images()), expected)
    mk.unpatch(loaded)
    assert not any(isinstance(module, DropIn) for module in loaded.modules())


def test_a_pickle_loads_in_a_process_that_imported_nothing() -> None:
    model = create(SMALL)
    mk.patch(model)
    x = images()
    with torch.no_grad():
        expected = model(x)
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1); torch.set_grad_enabled(False);"
        "model, x, expected = pickle.load(sys.stdin.buffer);"
        "sys.exit(0 if torch.equal(model(x), expected) else 1)"
    )
    package = str(mk.__path__[0]).rpartition("/")[0]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {package!r}); {code}"],
        input=pickle.dumps((model, x, expected)),
        check=True,
        timeout=300,
    )


def test_torch_save_and_load_work() -> None:
    model = create(SMALL)
    mk.patch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_state_dicts_go_both_ways() -> None:
    patched, plain = create(SMALL, seed=1), create(SMALL, seed=2)
    mk.patch(patched)
    with torch.no_grad():
        patched(images())
        plain.load_state_dict(patched.state_dict())
        assert_follows_its_parameters(patched)
        other = create(SMALL, seed=3)
        patched.load_state_dict(other.state_dict())
        assert_follows_its_parameters(patched)
        x = images()
        eager, exact = other(x), double_of(other)(x.double())
        assert_as_exact(patched(x), eager, exact, roundings=convolutions(other))
        plain.load_state_dict(create(SMALL, seed=1).state_dict())
        assert_as_exact(plain(x), mk.unpatch(create(SMALL, seed=1))(x), double_of(plain)(x.double()))


def test_assigned_state_dicts_are_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        model(images())
    model.load_state_dict(create(SMALL, seed=5).state_dict(), assign=True)
    assert_follows_its_parameters(model)


def _in_place(model: Any) -> None:
    model.blocks[2][0].dw_mid.bn.running_var.mul_(3)


def _layer_weight(model: Any) -> None:
    model.blocks[0][0].conv.weight.add_(0.1)


def _stem(model: Any) -> None:
    model.bn1.bias.add_(1)


def _classifier(model: Any) -> None:
    model.classifier.weight.mul_(2)


def _new_parameter(model: Any) -> None:
    conv = model.blocks[2][1].pw_proj.conv
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def _new_buffer(model: Any) -> None:
    norm = model.blocks[2][1].pw_proj.bn
    norm.running_mean = torch.randn_like(norm.running_mean)


def _new_data(model: Any) -> None:
    conv = model.blocks[2][1].pw_exp.conv
    conv.weight.data = torch.randn_like(conv.weight)


def _new_data_twice(model: Any) -> None:
    # the second storage may come to lie where the first one was
    conv = model.blocks[2][1].pw_exp.conv
    conv.weight.data = conv.weight.data * 2
    conv.weight.data = conv.weight.data * 2


def _swapped_data(model: Any) -> None:
    first, second = model.blocks[2][2].pw_exp.conv.weight, model.blocks[2][3].pw_exp.conv.weight
    first.data, second.data = second.data, first.data


def _new_module(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.act = nn.SiLU()


def _new_block(model: Any) -> None:
    model.blocks[2][1] = copy.deepcopy(model.blocks[2][2])


def _epsilon(model: Any) -> None:
    model.blocks[2][1].dw_mid.bn.eps = 0.3


def _no_skip(model: Any) -> None:
    model.blocks[2][1].has_skip = False


def _dilation(model: Any) -> None:
    conv = model.blocks[2][1].dw_mid.conv
    conv.dilation, conv.padding = (2, 2), (conv.padding[0] * 2, conv.padding[1] * 2)


def _inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model.blocks[2][1].dw_mid.conv.weight.mul_(2)


def _functional(model: Any) -> None:
    nn.init.normal_(model.conv_head.weight)


EDITS = [_in_place, _layer_weight, _stem, _classifier, _new_parameter, _new_buffer, _new_data, _new_data_twice]
EDITS += [_swapped_data, _new_module, _new_block, _epsilon, _no_skip, _dilation, _inference_mode, _functional]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_an_edit_is_seen_at_the_next_call(edit: Callable[[nn.Module], None]) -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        before = model(images())
        edit(model)
        after = model(images())
    assert not torch.equal(before, after)
    assert_follows_its_parameters(model)


@pytest.mark.parametrize("edit", ["gamma", "attention norm", "query", "key", "heads"])
def test_edits_of_attention_are_seen(edit: str) -> None:
    model = create(HYBRID)
    mk.patch(model)
    block = next(module for module in model.modules() if type(module).__name__ == "FusedMobileAttention")
    with torch.no_grad():
        before = model(images())
        if edit == "gamma":
            block.layer_scale.gamma.mul_(2)
        elif edit == "attention norm":
            block.norm.running_mean.add_(0.5)
        elif edit == "query":
            block.attn.query.proj.weight.mul_(2)
        elif edit == "key":
            block.attn.key.down_conv.weight.mul_(2)
        else:
            block.attn.num_heads //= 2
            block.attn.key_dim *= 2
            block.attn.value_dim *= 2
            for path in (block.attn.key, block.attn.value):
                weight = path.proj.weight
                path.proj.weight = nn.Parameter(torch.cat([weight, weight.flip(0)]))
        assert not torch.equal(before, model(images()))
    assert_follows_its_parameters(model)


def test_refresh_is_for_edits_that_leave_no_trace() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        before = model(images())
        model.blocks[2][0].pw_exp.conv.weight.data.mul_(2)
        assert torch.equal(model(images()), before), "seen after all: say so in `refresh`'s docs"
    mk.refresh(model)
    assert_follows_its_parameters(model)


def test_a_conversion_and_back_is_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        model(images())
        model.double()
        assert model(images().double()).dtype == torch.float64
        model.float()
    assert_follows_its_parameters(model)
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(images().to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_optimizer_step_is_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.no_grad():
        model(images())
    model.train()(images()).square().mean().backward()
    optimizer.step()
    model.eval()
    assert_follows_its_parameters(model)


def test_ema_copies_follow_the_model() -> None:
    from timm.utils import ModelEmaV3

    model = create(SMALL)
    mk.patch(model)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        ema.module(images())
        for parameter in model.parameters():
            parameter.mul_(1.1)
        ema.update(model)
    assert_follows_its_parameters(ema.module)


def test_swapped_tensors_are_seen() -> None:
    model = create(SMALL)
    mk.patch(model)
    with torch.no_grad():
        model(images())
        weight = model.blocks[2][0].pw_exp.conv.weight
        torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))
    assert_follows_its_parameters(model)


def test_patch_timm_makes_create_model_return_patched_models_until_it_ends() -> None:
    import timm.models

    original = timm.create_model
    mk.patch_timm()
    try:
        mk.patch_timm()
        assert isinstance(timm.create_model(SMALL), DropIn)
        assert isinstance(timm.models.create_model(SMALL), DropIn)
        assert not isinstance(timm.create_model("test_resnet"), DropIn)
    finally:
        mk.unpatch_timm()
    mk.unpatch_timm()
    assert timm.create_model is original
    assert timm.models.create_model is original
    assert not isinstance(timm.create_model(SMALL), DropIn)
