"""`bench --train`: what a step is, how it is judged, and what is not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnv4_kernels import patch
from mnv4_kernels.benchmark.case import Case, create_input, create_model
from mnv4_kernels.benchmark.flops import count_flops
from mnv4_kernels.benchmark.rounds import Protocol, measure
from mnv4_kernels.benchmark.runtimes import select
from mnv4_kernels.benchmark.training_step import TrainingStep
from mnv4_kernels.cli import main

pytest.importorskip("timm")

STEP = Case("mobilenetv4_conv_small_035", batch=4, size=64, threads=1, train=True)


class TestStep:
    def test_its_gradients_are_those_of_cross_entropy_each_of_norm_one(self) -> None:
        model, x = create_model(STEP), create_input(STEP)
        assert model.training
        found = TrainingStep(model, model, x, torch.float32).gradients()
        twin = create_model(STEP)
        F.cross_entropy(twin(x), torch.tensor([0, 1, 0, 1])).backward()
        weight = twin.classifier.weight.grad
        expected = (weight / weight.norm()).flatten()
        last = slice(-len(expected) - twin.classifier.bias.numel(), -twin.classifier.bias.numel())
        torch.testing.assert_close(found[last], expected)

    def test_what_it_keeps_for_the_backward_is_counted_once_and_without_parameters(self) -> None:
        x = torch.randn(4, 3, 8, 8)
        conv, relu = nn.Conv2d(3, 6, 3), nn.ReLU()
        model = nn.Sequential(conv, relu, nn.Flatten(), nn.Linear(6 * 36, 2))
        step = TrainingStep(model, model, x, torch.float32)
        # the activated map, which two read; the loss keeps log probabilities, the sum of their weights
        assert step.saved_mb() == pytest.approx((4 * 6 * 36 + 4 * 2 + 1) * 4e-6)
        assert TrainingStep(model, lambda x: model(x), x, torch.float32).saved_mb() is None

    def test_a_patched_model_keeps_at_most_three_fifths_of_what_eager_keeps(self) -> None:
        model, x = create_model(STEP), create_input(STEP)
        eager = TrainingStep(model, model, x, torch.float32).saved_mb()
        patch(model)
        patched = TrainingStep(model, model, x, torch.float32).saved_mb()
        assert eager is not None
        assert patched is not None
        assert patched <= 0.6 * eager

    def test_it_changes_parameters_and_statistics(self) -> None:
        model, x = create_model(STEP), create_input(STEP)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss = TrainingStep(model, model, x, torch.bfloat16)()
        assert loss.dtype == torch.float32
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {"classifier.weight", "conv_stem.weight", "bn1.running_mean", "bn1.num_batches_tracked"} <= changed

    def test_every_product_is_counted_three_times_but_the_first_ones_input_gradient(self) -> None:
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        one, two = 2 * 8 * 27 * 25, 2 * 16 * 8 * 25
        assert count_flops(nn.Sequential(first, second), (1, 3, 5, 5), train=True) == 2 * one + 3 * two


@pytest.mark.slow
class TestMeasure:
    def test_runtimes_that_train_are_judged_by_their_gradients_and_timed(self) -> None:
        result = measure(STEP, select(["eager", "ours patched"], train=True), Protocol(rounds=1, seconds=0.0))
        for row in result.rows:
            assert row.missing is None
            assert row.turns
            assert row.error is not None
            assert row.error > 0
        assert "training step" in result.case.title

    @pytest.mark.slow
    def test_wrong_gradients_are_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mnv4_kernels.benchmark.rounds.TRAINING_GATE", 0.0)
        (row,) = measure(STEP, select(["ours patched"], train=True), Protocol(rounds=1, seconds=0.0)).rows
        assert row.turns == []
        assert row.missing is not None
        assert row.missing.startswith("wrong: relative error ")


class TestCommand:
    def test_a_runtime_that_does_not_train_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "conv_small_035", "--train", "--runtimes", "ours optimized"]) == 2
        assert "`runtimes` must be among eager, " in capsys.readouterr().err

    def test_a_training_step_has_no_profile(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "conv_small_035", "--train", "--profile"]) == 2
        assert "leave out --train" in capsys.readouterr().err

    @pytest.mark.slow
    def test_the_table_and_the_file_name_the_step(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "train.json"
        command = ["bench", "conv_small_035", "--train", "--runtimes", "eager", "--json", str(file)]
        assert (
            main([*command, "--size", "64", "--batch", "4", "--threads", "1", "--rounds", "1", "--seconds", "0"]) == 0
        )
        assert "training step" in capsys.readouterr().out
        assert json.loads(file.read_text())["results"][0]["case"]["train"] is True
