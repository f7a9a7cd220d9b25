"""The whole-model benchmark: what is counted, how runtimes are judged, and what is written."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from mnv4_kernels.benchmark import worker
from mnv4_kernels.benchmark.case import Case, create_input, create_model, default_size, randomise
from mnv4_kernels.benchmark.ceilings import measure_ceilings
from mnv4_kernels.benchmark.flops import count_flops, least_bytes
from mnv4_kernels.benchmark.page import plot, render
from mnv4_kernels.benchmark.report import CaseResult, Report, Row, provenance
from mnv4_kernels.benchmark.rounds import Worker, WorkerError, measure
from mnv4_kernels.benchmark.runtimes import RUNTIMES, Runtime, select
from mnv4_kernels.cli import main

timm = pytest.importorskip("timm")

SMALL = Case("mobilenetv4_conv_small_035", size=64, threads=1)


class TestFlops:
    # GFLOP of one image, counted independently from the layers' shapes, attention included
    @pytest.mark.parametrize(
        ("model", "size", "gflop"),
        [
            ("conv_small_035", 224, 0.095),
            ("conv_small", 224, 0.37),
            ("conv_medium", 256, 2.16),
            ("conv_aa_medium", 256, 3.12),
            ("conv_large", 384, 12.75),
            ("hybrid_medium", 256, 2.54),
            ("hybrid_large", 384, 15.42),
        ],
    )
    def test_the_models_have_the_known_number(self, model: str, size: int, gflop: float) -> None:
        with torch.device("meta"):
            network = timm.create_model(f"mobilenetv4_{model}")
        assert count_flops(network, (1, 3, size, size)) / 1e9 == pytest.approx(gflop, abs=0.006)

    def test_they_grow_with_the_batch(self) -> None:
        conv = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        assert count_flops(conv, (1, 8, 5, 5)) == 2 * 16 * 25 * 2 * 9
        assert count_flops(conv, (3, 8, 5, 5)) == 3 * count_flops(conv, (1, 8, 5, 5))

    def test_attention_is_counted_fused_and_unfused(self) -> None:
        class Attention(nn.Module):
            fused = True

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if self.fused:
                    return nn.functional.scaled_dot_product_attention(x, x, x)
                return torch.softmax(x @ x.transpose(-2, -1), -1) @ x

        attention = Attention()
        expected = 2 * 2 * 4 * 10 * 10 * (16 + 16)
        assert count_flops(attention, (2, 4, 10, 16)) == expected
        attention.fused = False
        assert count_flops(attention, (2, 4, 10, 16)) == expected

    def test_counting_leaves_the_model_alone(self) -> None:
        conv = nn.Conv2d(3, 4, 1)
        count_flops(conv, (1, 3, 2, 2))
        assert conv.weight.device.type == "cpu"
        assert conv.training

    def test_the_least_traffic_is_the_parameters_and_the_input_once(self) -> None:
        assert least_bytes(nn.Linear(4, 3), 8, 2) == (4 * 3 + 3 + 8) * 2


class TestCase:
    def test_randomised_normalisation_has_no_default_left(self) -> None:
        model = randomise(timm.create_model("mobilenetv4_hybrid_medium_075"))
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                assert module.running_mean is not None
                for values in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert values.std() > 0, name
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                assert module.gamma.min() > 0.1, name

    def test_the_same_case_is_the_same_model_and_input(self) -> None:
        first, second = create_model(SMALL).state_dict(), create_model(SMALL).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert torch.equal(create_input(SMALL), create_input(SMALL))

    def test_the_photograph_is_normalised_and_fills_the_batch(self) -> None:
        pytest.importorskip("sklearn")
        x = create_input(Case(SMALL.model, batch=2, size=96, photo=True))
        assert x.shape == (2, 3, 96, 96)
        assert torch.equal(x[0], x[1])
        assert x.std() > 0.5
        assert x.abs().max() < 3

    def test_the_default_size_is_timms(self) -> None:
        assert default_size("mobilenetv4_conv_large") == 384
        with pytest.raises(ValueError, match="`model` must be a model of timm that has a configuration, got 'nothing'"):
            default_size("nothing")


class TestRuntimes:
    def test_names_are_selected_in_order(self) -> None:
        assert [runtime.name for runtime in select(["ours patched", "eager"])] == ["ours patched", "eager"]
        assert select(None) == list(RUNTIMES)
        with pytest.raises(ValueError, match=r"`runtimes` must be among eager, .*got 'abacus'"):
            select(["abacus"])

    def test_what_is_not_installed_is_missing_with_its_name(self) -> None:
        runtime = Runtime("other", RUNTIMES[0].build, needs=("no_such_module",), dtypes=(torch.float32,))
        assert runtime.missing(torch.float32) == ["no_such_module not installed"]
        assert runtime.missing(torch.bfloat16) == ["no_such_module not installed", "no bfloat16 on the CPU"]
        assert RUNTIMES[0].missing(torch.float32) == []

    def test_the_error_is_relative_to_the_largest_value(self) -> None:
        expected = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
        assert worker.relative_error(torch.tensor([[1.0, -3.0]]), expected) == pytest.approx(0.25)

    def test_a_turn_makes_at_least_three_calls_after_an_untimed_one(self) -> None:
        calls = []

        def run() -> torch.Tensor:
            calls.append(None)
            return torch.empty(0)

        assert len(worker.time_turn(run, 0.0)["ms"]) == 3
        assert len(calls) == 4

    def test_the_ceilings_are_positive_and_say_how_they_were_found(self) -> None:
        ceilings = measure_ceilings(torch.float32, 1, 1 << 20)
        assert ceilings.gflops > 1
        assert ceilings.gbytes > 0.1
        assert ceilings.source


class TestMeasure:
    def test_a_failing_or_missing_runtime_keeps_its_row_with_the_reason(self) -> None:
        eager = RUNTIMES[0]
        unknown = Runtime("abacus", eager.build, ours=True)
        absent = Runtime("absent", eager.build, needs=("no_such_module",))
        result = measure(SMALL, [eager, unknown, absent], rounds=2, seconds=0.0)
        first, second, third = result.rows
        assert first.missing is None
        assert [len(turn) for turn in first.rounds] == [3, 3]
        assert first.error is not None
        assert first.error < 1e-4
        assert second.missing is not None
        assert second.missing.startswith("failed: ValueError: `runtimes` must be among")
        assert third.missing == "no_such_module not installed"
        assert result.broken()
        assert result.share(first) is not None

    def test_a_wrong_result_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mnv4_kernels.benchmark.rounds.GATES", {"float32": 0.0})
        result = measure(SMALL, [RUNTIMES[0]], rounds=1, seconds=0.0)
        (row,) = result.rows
        assert row.rounds == []
        assert row.missing is not None
        assert row.missing.startswith("wrong: relative error ")

    def test_workers_import_the_package_that_started_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoy = tmp_path / "mnv4_kernels"
        decoy.mkdir()
        (decoy / "__init__.py").write_text("raise ImportError('the working directory was imported')")
        monkeypatch.chdir(tmp_path)
        (row,) = measure(SMALL, [RUNTIMES[0]], rounds=1, seconds=0.0).rows
        assert row.missing is None
        assert row.rounds

    def test_a_worker_that_dies_is_reported(self) -> None:
        dead = Worker(SMALL)
        dead._process.kill()
        dead._process.wait()
        with pytest.raises(WorkerError, match="the process died"):
            dead.ask("prepare", folder="")
        dead.close()


def made_up_result() -> CaseResult:
    """A result with known figures: 1 GFLOP at 500 GFLOP/s is a floor of 2 ms."""
    rows = [
        Row("eager", rounds=[[9.0, 10.0, 11.0], [10.0, 10.0, 40.0]], error=1e-6),
        Row("torch.compile", rounds=[[8.0]], error=1e-6),
        Row("ours patched", ours=True, rounds=[[4.0], [4.5], [3.5]], error=2e-6),
        Row("openvino", missing="openvino not installed"),
    ]
    return CaseResult(SMALL, flops=10**9, bytes=10**6, gflops=500.0, gbytes=50.0, source="a test", rows=rows)


class TestReport:
    def test_figures_follow_from_the_rounds(self) -> None:
        result = made_up_result()
        eager, _, ours, missing = result.rows
        assert eager.median == 10.0
        assert eager.minimum == 9.0
        assert result.floor == 2.0
        assert result.speedup(ours) == 2.5
        assert result.share(ours) == 0.5
        assert missing.median is None
        assert result.lead() == "ours patched is 2.00 times as fast as torch.compile, the best of the others"

    def test_the_table_shows_what_is_missing(self) -> None:
        head, rows = made_up_result().table()
        assert head == ["runtime", "median ms", "min ms", "speed-up", "max rel. error", "of roofline"]
        assert rows[2] == ["ours patched", "4.00", "3.50", "2.50x", "2.0e-06", "50%"]
        assert rows[3] == ["openvino", "openvino not installed", "", "", "", ""]

    def test_the_page_is_whole_and_needs_no_other_file(self) -> None:
        page = render(Report([made_up_result()], provenance()))
        open_tags: list[str] = []

        class Balance(HTMLParser):
            def handle_starttag(self, tag: str, attrs: object) -> None:
                if tag not in ("meta",):
                    open_tags.append(tag)

            def handle_startendtag(self, tag: str, attrs: object) -> None:
                """Opened and closed at once."""

            def handle_endtag(self, tag: str) -> None:
                assert open_tags.pop() == tag

        Balance().feed(page)
        assert open_tags == []
        assert "src=" not in page
        assert "href=" not in page

    def test_the_plot_has_a_bar_for_each_timed_runtime_and_a_floor(self) -> None:
        drawing = plot(made_up_result())
        assert drawing.count("<rect") == 3
        assert drawing.count("class='ours'") == 1
        assert drawing.count("class='floor'") == 1
        # eager is the longest bar, ours 0.4 of it
        assert "width='480.0'" in drawing
        assert "width='192.0'" in drawing

    def test_provenance_names_command_machine_and_versions(self) -> None:
        facts = provenance()
        assert {"command", "commit", "date", "cpu", "gpu", "python", "versions"} == set(facts)
        assert facts["versions"]["torch"]
        assert "openvino" in facts["versions"]


class TestCommand:
    def test_bench_writes_json_and_html_and_prints_the_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written, page = tmp_path / "bench.json", tmp_path / "bench.html"
        runtimes = ["--runtimes", "eager", "ours patched", "--rounds", "2", "--seconds", "0"]
        outputs = ["--json", str(written), "--html", str(page)]
        assert main(["bench", "conv_small_035", "--size", "64", "--threads", "1", *runtimes, *outputs]) == 0
        printed = capsys.readouterr()
        assert "ours patched is " in printed.out
        assert "floor " in printed.out
        assert "round 2 of 2" in printed.err
        (result,) = json.loads(written.read_text())["results"]
        assert [row["name"] for row in result["rows"]] == ["eager", "ours patched"]
        assert all(row["error"] < 1e-5 for row in result["rows"])
        assert "<svg" in page.read_text()

    def test_demo_classifies_the_photograph_as_timm_does(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        from mnv4_kernels.cli.demo import classify

        assert classify(Case("mobilenetv4_conv_small_035", size=96, threads=1, photo=True))
        assert "the five best classes agree" in capsys.readouterr().out
