"""A patched model in train mode trains as timm's: gradients, statistics, and everything people do while they train."""

from __future__ import annotations

import copy

import pytest
import torch
from models import HYBRID, NAMES, SMALL, assert_same_strides, double_of, images, ops_called
from torch import nn
from training_models import assert_trains_alike, loss_of, norms_of, smooth, trained

import mnv4_kernels as mk
from mnv4_kernels.backends import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="; ".join(native.reasons())),
    pytest.mark.usefixtures("one_thread"),
]

#: dense, depthwise and pointwise convolutions, attention, and a piece that no op knows
FEW = (SMALL, HYBRID, "mobilenetv4_conv_aa_medium")


class TestGradients:
    @pytest.mark.parametrize("name", FEW)
    def test_every_gradient_and_statistic_is_as_exact_as_eagers(self, name: str) -> None:
        assert_trains_alike(smooth(name))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", sorted({*NAMES} - {*FEW}))
    def test_so_it_is_in_the_other_models(self, name: str) -> None:
        # one draw of weights may amplify one early rounding: of conv_small_050, ours are 1.8, 0.6, 0.5 and 0.6 times
        # as far from float64 as eager's with the seeds 0 to 3, in the median over parameters; an error fails each time
        failures = []
        for seed in range(3):
            try:
                assert_trains_alike(smooth(name, seed=seed), images(4, 3, 64, 64, seed=seed + 1))
            except AssertionError as error:
                failures.append(f"seed {seed}: {error}")
        assert len(failures) <= 1, failures

    @pytest.mark.parametrize("shape", [(4, 3, 64, 96), (4, 3, 75, 61)])
    def test_oblong_and_odd_images_in_both_memory_formats(self, shape: tuple[int, ...]) -> None:
        assert_trains_alike(smooth(), images(*shape).contiguous(memory_format=torch.channels_last))
        assert_trains_alike(smooth(), images(*shape))

    def test_features_lie_in_memory_as_eagers_do(self) -> None:
        for name in (SMALL, HYBRID):
            model = smooth(name)
            twin = copy.deepcopy(model)
            mk.patch(twin)
            for x in (images(), images().contiguous(memory_format=torch.channels_last)):
                assert_same_strides(twin.forward_features(x), model.forward_features(x))

    def test_a_second_derivative_is_refused_in_words(self) -> None:
        model = smooth()
        mk.patch(model)
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated twice"):
            grad.square().sum().backward()


class TestBatchNorm:
    @pytest.mark.parametrize("momentum", [0.01, None])
    def test_running_statistics_follow_the_momentum(self, momentum: float | None) -> None:
        model = smooth()
        for norm in norms_of(model):
            norm.momentum = momentum

        def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            model(x * 2)
            return model(x)

        assert_trains_alike(model, step=twice)

    def test_a_frozen_batch_norm_uses_and_keeps_its_running_statistics(self) -> None:
        model = smooth()
        for norm in norms_of(model)[::2]:
            norm.eval()
        assert_trains_alike(model)

    def test_one_value_a_channel_is_refused_as_in_eager(self) -> None:
        model = smooth(HYBRID)
        mk.patch(model)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(images(1, 3, 32, 32))

    def test_sync_batch_norm_keeps_torchs_path(self) -> None:
        """Whether it is converted before or after patching: its statistics are not those of one process."""
        from timm.layers import convert_sync_batchnorm

        before, after = (convert_sync_batchnorm(smooth()), smooth())
        with pytest.warns(UserWarning, match="nothing to replace"):
            assert not mk.patch(before).replaced
        mk.patch(after)
        plan = convert_sync_batchnorm(after).blocks[2][0]._mnv4_training_plan()
        assert "the statistics of SyncBatchNormAct are of all processes" in plan.obstacle


class TestHabits:
    def test_frozen_parameters_get_no_gradient_and_the_others_theirs(self) -> None:
        for frozen in ("blocks.0", "blocks.2", "bn", "conv"):
            model = smooth()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(frozen not in name)
            assert_trains_alike(model)

    def test_gradient_checkpointing(self) -> None:
        model = smooth()
        model.set_grad_checkpointing()
        assert_trains_alike(model)

    def test_gradients_accumulate(self) -> None:
        def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            loss_of(model(x * 0.5)).backward()
            return model(x)

        assert_trains_alike(smooth(), step=twice)

    def test_a_model_used_twice_in_one_loss(self) -> None:
        assert_trains_alike(smooth(), step=lambda model, x: model(x) + model(x.flip(-1)))

    def test_stochastic_depth_draws_as_timm_does(self) -> None:
        for name in (SMALL, HYBRID):
            assert_trains_alike(smooth(name, drop_path_rate=0.5, drop_rate=0.2))

    def test_a_hook_inside_a_block_sees_what_it_would_in_eager(self) -> None:
        model = smooth()
        mk.patch(model)
        seen: list[int] = []
        model.blocks[2][1].pw_exp.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            model(images())
        assert seen

    def test_the_heads_convolution_has_its_op_unless_someone_looks_at_it(self) -> None:
        model = smooth()
        mk.patch(model)
        x = model.forward_features(images(4, 3, 64, 64)).detach()
        assert ops_called(lambda: model.forward_head(x)) == ["bn_act_pwconv", "bn_act"]
        assert ops_called(lambda: model.forward_head(x, pre_logits=True)) == ["bn_act_pwconv", "bn_act"]
        seen: list[int] = []
        model.norm_head.register_forward_hook(lambda *_: seen.append(1))
        assert ops_called(lambda: model.forward_head(x)) == []
        assert seen

    def test_a_hook_on_a_block_gets_its_whole_result(self) -> None:
        model = smooth()
        seen: list[torch.Tensor] = []
        model.blocks[0][0].register_forward_hook(lambda module, given, result: seen.append(result))
        model(images())
        mk.patch(model)
        model(images())
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_with_a_gradient_scaler(self, dtype: torch.dtype) -> None:
        model = smooth()
        x, labels = images(4, 3, 64, 64), torch.arange(4)
        exact = double_of(copy.deepcopy(model))
        nn.functional.cross_entropy(exact(x.double()), labels).backward()
        twin = copy.deepcopy(model)
        mk.patch(twin)
        errors = []
        for net in (model, twin):
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
            with torch.autocast("cpu", dtype):
                logits = net(x)
                assert logits.dtype == dtype
                loss = nn.functional.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            pairs = zip(net.parameters(), exact.parameters(), strict=True)
            assert all(p.grad.dtype == torch.float32 for p in net.parameters())
            errors.append(sum((p.grad.double() - q.grad).square().sum().item() for p, q in pairs) ** 0.5)
        assert errors[1] <= 2 * errors[0]

    def test_an_average_of_weights_follows(self) -> None:
        from timm.utils import ModelEmaV3

        model = smooth()
        mk.patch(model)
        average = ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = copy.deepcopy(model.state_dict())
        loss_of(model(images())).backward()
        optimizer.step()
        average.update(model)
        now = model.state_dict()
        for name, value in average.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, (before[name] + now[name]) / 2)
        loss_of(average.module(images())).backward()

    def test_a_switch_sends_a_training_op_down_timms_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = smooth()
        mk.patch(model)
        monkeypatch.setenv("MNV4_KERNELS_DISABLE_BN_ACT_DWCONV", "1")
        called = ops_called(lambda: model(images()))
        assert "bn_act_conv" in called
        assert "bn_act_dwconv" not in called

    def test_the_thread_count_changes_no_bit(self) -> None:
        model = smooth(HYBRID)
        mk.patch(model)
        threads = torch.get_num_threads()
        found = []

        def features(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
            """All that ops compute: the classifier is torch's own."""
            return net.forward_head(net.forward_features(x), pre_logits=True)

        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(trained(copy.deepcopy(model), images(), features))
        torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(value, other[name]) for name, value in found[0].items())
