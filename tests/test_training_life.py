"""What people do to a patched model between two steps of its training, and how they freeze parts of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    HYBRID,
    assert_as_exact,
    assert_patched_is_as_exact,
    convolutions,
    create,
    double_of,
    images,
    ops_called,
)
from torch import nn
from training_models import assert_trains_alike, loss_of, norms_of, smooth, trained

import mnv4_kernels as mk
from mnv4_kernels.backends import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons())),
    pytest.mark.usefixtures("one_thread"),
]

Edit = Callable[[Any], None]


def another_activation(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.act = nn.Hardswish()


def another_convolution(model: Any) -> None:
    old = model.blocks[2][1].pw_exp.conv
    torch.manual_seed(3)
    model.blocks[2][1].pw_exp.conv = nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False)


def a_convolution_that_no_op_knows(model: Any) -> None:
    old = model.blocks[2][1].pw_exp.conv
    torch.manual_seed(3)
    model.blocks[2][1].pw_exp.conv = nn.Sequential(old, nn.Conv2d(old.out_channels, old.out_channels, 1))


def no_normalisation(model: Any) -> None:
    model.blocks[2][1].pw_proj.bn = nn.Identity()


def another_parameter(model: Any) -> None:
    conv = model.blocks[2][1].pw_exp.conv
    conv.weight = nn.Parameter(conv.weight.detach() * 0.5)


def another_momentum(model: Any) -> None:
    model.blocks[2][1].pw_exp.bn.momentum = 0.5


def a_frozen_block(model: Any) -> None:
    model.blocks[2][1].eval()


class TestExchange:
    @pytest.mark.parametrize(
        "edit",
        [
            another_activation, another_convolution, a_convolution_that_no_op_knows, no_normalisation,
            another_parameter, another_momentum, a_frozen_block,
        ],
    )  # fmt: skip
    def test_what_is_exchanged_after_a_step_counts_in_the_next(self, edit: Edit) -> None:
        model = smooth()
        mk.patch(model)
        trained(model, images())
        edit(model)
        assert_trains_alike(model)


class TestPatchingInTheMiddle:
    def test_patching_between_two_steps_keeps_parameters_and_the_optimizers_state(self) -> None:
        model = smooth()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        parameters = list(model.parameters())
        for change in (lambda: None, lambda: mk.patch(model), lambda: mk.unpatch(model), lambda: mk.patch(model)):
            change()
            optimizer.zero_grad()
            loss_of(model(images())).backward()
            optimizer.step()
        assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
        steps = {float(state["step"]) for state in optimizer.state.values()}
        assert steps == {4.0}
        assert_trains_alike(model)

    def test_unpatching_between_forward_and_backward_changes_no_gradient(self) -> None:
        model = smooth(HYBRID)
        mk.patch(model)
        x = images()
        expected = trained(copy.deepcopy(model), x)

        def unpatched_before_its_backward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            y = model(x)
            mk.unpatch(model)
            return y

        found = trained(model, x, unpatched_before_its_backward)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert not ops_called(lambda: trained(model, x))

    def test_evaluation_between_two_steps_sees_the_weights_and_statistics_of_now(self) -> None:
        model = smooth()
        mk.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        x = images()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model.train()(x)).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                eager = mk.unpatch(copy.deepcopy(model))(x)
                assert_as_exact(model(x), eager, double_of(model)(x.double()), roundings=convolutions(model))

    def test_a_loaded_state_counts_in_the_next_step(self) -> None:
        model, other = smooth(), smooth(seed=1)
        mk.patch(model)
        trained(model, images())
        model.load_state_dict(other.state_dict())
        assert_trains_alike(model)


class TestFreezing:
    def test_only_the_classifier_learns(self) -> None:
        model = smooth()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
        assert_trains_alike(model)

    def test_a_frozen_trunk_builds_no_graph(self) -> None:
        model = smooth()
        for parameter in model.blocks.parameters():
            parameter.requires_grad_(False)
        for parameter in (*model.conv_stem.parameters(), *model.bn1.parameters()):
            parameter.requires_grad_(False)
        mk.patch(model)
        assert "bn_act_pwconv" in ops_called(lambda: model(images()))
        assert not model.forward_features(images()).requires_grad

    def test_every_batch_norm_in_eval_mode(self) -> None:
        model = smooth(HYBRID)
        for norm in norms_of(model):
            norm.eval()
        assert_trains_alike(model, images())

    def test_timms_frozen_batch_norm(self) -> None:
        from timm.layers import freeze_batch_norm_2d

        model = freeze_batch_norm_2d(smooth())
        assert not norms_of(model)
        assert_trains_alike(model)
        mk.patch(model)
        assert "bn_act_dwconv" in ops_called(lambda: model(images()))

    def test_timms_frozen_batch_norm_is_folded_in_eval_mode(self) -> None:
        from timm.layers import freeze_batch_norm_2d

        model = freeze_batch_norm_2d(create())
        report = assert_patched_is_as_exact(model, images())
        assert not report.partly

    def test_a_batch_norm_frozen_by_timm_after_a_step(self) -> None:
        from timm.layers import freeze_batch_norm_2d

        model = smooth()
        mk.patch(model)
        trained(model, images())
        assert_trains_alike(freeze_batch_norm_2d(model))


class TestHabits:
    def test_weights_in_channels_last(self) -> None:
        model = smooth(HYBRID).to(memory_format=torch.channels_last)
        assert_trains_alike(copy.deepcopy(model))
        assert_trains_alike(model, images(4, 3, 64, 64).contiguous(memory_format=torch.channels_last))

    def test_gradients_lie_in_memory_as_their_parameters_do(self) -> None:
        model = smooth().to(memory_format=torch.channels_last)
        mk.patch(model)
        loss_of(model(images())).backward()
        assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)

    def test_blocks_that_share_a_parameter(self) -> None:
        model = smooth()
        first, second = model.blocks[2][1], model.blocks[2][2]
        first.pw_exp.conv.weight = second.pw_exp.conv.weight
        assert_trains_alike(model)

    def test_a_block_that_is_used_twice(self) -> None:
        model = smooth()
        model.blocks[2][2] = model.blocks[2][1]
        assert_trains_alike(model)

    def test_dropout_inside_attention_draws_as_timm_does(self) -> None:
        model = smooth(HYBRID)
        for module in model.modules():
            if hasattr(module, "attn_drop"):
                module.output.drop.p = 0.5
        assert_trains_alike(model)
        assert "mqa" not in ops_called(lambda: model(images()))

    def test_statistics_are_estimated_anew_without_gradients(self) -> None:
        """torch.optim.swa_utils.update_bn: momentum None, train mode, no_grad."""
        model = smooth()
        mk.patch(model)
        batches = [images(seed=seed) for seed in range(3)]
        found = []
        for net in (model, mk.unpatch(copy.deepcopy(model)), double_of(model)):
            dtype = next(net.parameters()).dtype
            torch.optim.swa_utils.update_bn([batch.to(dtype) for batch in batches], net)
            found.append([buffer for name, buffer in net.named_buffers() if ".running_" in name])
        for mine, eager, exact in zip(*found, strict=True):
            assert_as_exact(mine, eager, exact, roundings=256)

    def test_checkpointed_blocks_draw_the_same_stochastic_depth_again(self) -> None:
        model = smooth(drop_path_rate=0.5)
        model.set_grad_checkpointing()
        assert_trains_alike(model)

    def test_checkpointing_inside_accumulation_under_autocast(self) -> None:
        """All at once: the gradient's error against float64 is eager's."""
        model = smooth()
        exact = double_of(copy.deepcopy(model))
        patched = copy.deepcopy(model)
        mk.patch(patched)
        errors = []
        for net in (exact, model, patched):
            net.set_grad_checkpointing()
            for part in images(8, 3, 64, 64).chunk(2):
                low = torch.autocast("cpu", torch.bfloat16, enabled=net is not exact)
                with low:
                    logits = net(part.double() if net is exact else part)
                loss_of(logits.double()).backward()
            pairs = zip(net.parameters(), exact.parameters(), strict=True)
            errors.append(sum((p.grad.double() - q.grad).square().sum().item() for p, q in pairs) ** 0.5)
        assert errors[2] <= 2 * errors[1]
