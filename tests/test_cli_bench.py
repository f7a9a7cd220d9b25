"""The whole-model benchmark: what is counted, how runtimes are judged, and what is written."""

from __future__ import annotations

import dataclasses
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mnv4_kernels.benchmark import environments, markdown
from mnv4_kernels.benchmark.case import Case, create_input, create_model, default_size, randomise
from mnv4_kernels.benchmark.ceilings import measure_ceilings
from mnv4_kernels.benchmark.flops import count_flops, least_bytes
from mnv4_kernels.benchmark.foreign import player
from mnv4_kernels.benchmark.intervals import ratio, spread
from mnv4_kernels.benchmark.kit import ConversionError, Kit
from mnv4_kernels.benchmark.page import plot, render
from mnv4_kernels.benchmark.report import CaseResult, Report, Row, Turn, provenance, regressions
from mnv4_kernels.benchmark.rounds import Protocol, Worker, WorkerError, measure, prepare
from mnv4_kernels.benchmark.runtimes import RUNTIMES, Foreign, Runtime, select
from mnv4_kernels.cli import main, parser
from mnv4_kernels.cli.arguments import cases_of
from mnv4_kernels.tables import render as table

timm = pytest.importorskip("timm")

NOWHERE = environments.Environment("nowhere", (), ("no_such_module",))
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
        model = timm.create_model("mobilenetv4_hybrid_medium_075").eval()
        randomise(model, torch.randn(1, 3, 64, 64))
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

    def test_what_is_not_installed_is_missing_with_its_name(self, tmp_path: Path) -> None:
        runtime = Runtime("other", Foreign("model.onnx", NOWHERE, NOWHERE), dtypes=(torch.float32,))
        assert runtime.missing(torch.float32, tmp_path) == ["no_such_module not installed"]
        assert runtime.missing(torch.bfloat16, tmp_path) == ["no_such_module not installed", "no bfloat16 on the CPU"]
        assert RUNTIMES[0].missing(torch.float32) == []

    def test_an_environment_that_pip_refuses_is_missing_with_pips_reason(self, tmp_path: Path) -> None:
        refused = environments.Environment("refused", ("./no-such-folder-here",), ("no_such_module",))
        reason = refused.create(tmp_path)
        assert reason is not None
        assert refused.missing(tmp_path) == [f"refused can't be installed: {reason}"]
        assert refused.python(tmp_path) is None

    def test_an_environment_goes_before_the_modules_beside_the_package(self, tmp_path: Path) -> None:
        here = environments.Environment("here", (), ("torch",))
        assert here.python(tmp_path) == sys.executable
        interpreter = tmp_path / "here" / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.touch()
        assert here.python(tmp_path) == str(interpreter)

    def test_the_error_is_relative_to_the_largest_value(self) -> None:
        expected = np.array([[1.0, -4.0]])
        assert player.relative_error(np.array([[1.0, -3.0]], dtype=np.float32), expected) == pytest.approx(0.25)

    def test_a_turn_makes_at_least_three_calls_after_an_untimed_one(self) -> None:
        calls = []
        turns = player.Turns()
        turns.start()
        turns.built(lambda: calls.append(None))
        assert turns.turn(0.0)["turn"]["calls"] == 3
        assert len(calls) == 4

    @pytest.mark.skipif(player.resident() is None, reason="the system does not tell what a process holds")
    def test_memory_is_what_the_network_holds_beyond_what_was_there(self) -> None:
        before = np.ones(8 << 20)
        turns = player.Turns()
        turns.start()
        held = np.ones(4 << 20)
        loading = turns.built(lambda: np.ones(2 << 20))["loading_mb"]
        assert loading == pytest.approx(held.nbytes / 1e6, rel=0.2)
        assert turns.turn(0.0)["memory_mb"] == pytest.approx((held.nbytes + 16 * (1 << 20)) / 1e6, rel=0.2)
        assert before.nbytes > held.nbytes

    def test_energy_is_read_in_joules_where_the_machine_tells(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counter = tmp_path / "energy_uj"
        monkeypatch.setattr(player, "ENERGY", counter)
        assert player.energy() is None
        counter.write_text("2500000\n")
        assert player.energy() == 2.5

    def test_the_ceilings_are_positive_and_say_how_they_were_found(self) -> None:
        ceilings = measure_ceilings(torch.float32, 1, 1 << 20)
        assert ceilings.gflops > 1
        # a loaded machine reads slowly, but none slower than this
        assert ceilings.gbytes > 1e-3
        assert ceilings.source


class TestMeasure:
    @pytest.mark.slow
    def test_a_failing_or_missing_runtime_keeps_its_row_with_the_reason(self) -> None:
        eager = RUNTIMES[0]
        unknown = Runtime("abacus", eager.how, ours=True)
        absent = Runtime("absent", Foreign("model.onnx", NOWHERE, NOWHERE))
        result = measure(SMALL, [eager, unknown, absent], Protocol(rounds=2, seconds=0.0))
        first, second, third = result.rows
        assert first.missing is None
        assert [turn.calls for turn in first.turns] == [3, 3]
        assert first.error is not None
        assert first.error < 1e-4
        assert first.error_float32 == 0
        assert second.missing is not None
        assert second.missing.startswith("failed: ValueError: `runtimes` must be among")
        assert third.missing == "no_such_module not installed"
        assert result.broken()
        assert result.share(first) is not None

    def test_a_wrong_result_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mnv4_kernels.benchmark.rounds.GATES", {"float32": 0.0})
        result = measure(SMALL, [RUNTIMES[0]], Protocol(rounds=1, seconds=0.0))
        (row,) = result.rows
        assert row.turns == []
        assert row.missing is not None
        assert row.missing.startswith("wrong: relative error ")

    def test_a_runtime_of_another_environment_plays_the_converted_file(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        (runtime,) = select(["onnxruntime"])
        # no environment: both modules are beside the package
        protocol = Protocol(rounds=1, seconds=0.0, environments=tmp_path / "none", cache=tmp_path)
        (row,) = measure(SMALL, [runtime], protocol).rows
        assert row.missing is None
        assert row.error is not None
        assert row.error < 1e-4
        assert row.version
        assert len(list(tmp_path.glob("*/model.onnx"))) == 1

    def test_a_conversion_that_fails_is_reported_with_its_last_words(self, tmp_path: Path) -> None:
        here = environments.Environment("here", (), ("torch",))
        with Kit(SMALL.resolved(), tmp_path) as kit:
            (kit.folder / "model.pt2").write_text("no program")
            with pytest.raises(ConversionError, match=r"\w+: "):
                kit.convert(Foreign("model.onnx", here, here), tmp_path)
            assert not (kit.folder / "model.onnx").exists()

    @pytest.mark.slow
    def test_preparing_fills_the_cache_and_measuring_reads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        protocol = Protocol(rounds=1, seconds=0.0, cache=tmp_path)
        (row,) = prepare(SMALL, [RUNTIMES[0]], protocol)
        assert row.missing is None
        assert row.turns == []
        (reference,) = tmp_path.glob("mobilenetv4_conv_small_035-64px-batch1-seed0-*/float64.npy")
        np.save(reference, np.load(reference) + 1)
        (row,) = measure(SMALL, [RUNTIMES[0]], protocol).rows
        assert row.missing is not None
        assert row.missing.startswith("wrong")

    @pytest.mark.slow
    def test_workers_import_the_package_that_started_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoy = tmp_path / "mnv4_kernels"
        decoy.mkdir()
        (decoy / "__init__.py").write_text("raise ImportError('the working directory was imported')")
        monkeypatch.chdir(tmp_path)
        (row,) = measure(SMALL, [RUNTIMES[0]], Protocol(rounds=1, seconds=0.0)).rows
        assert row.missing is None
        assert row.turns

    def test_a_worker_that_dies_is_reported(self) -> None:
        dead = Worker(SMALL)
        dead._process.kill()
        dead._process.wait()
        with pytest.raises(WorkerError, match="the process died"):
            dead.ask("prepare", folder="")
        dead.close()


def made_up_turns(*medians: float) -> list[Turn]:
    return [Turn(5, 0.9 * median, 0.95 * median, median, 1.05 * median) for median in medians]


def made_up_result() -> CaseResult:
    """A result with known figures: 1 GFLOP at 500 GFLOP/s is a floor of 2 ms."""
    rows = [
        Row("eager", turns=made_up_turns(10.0, 9.0, 11.0), error=1e-6, memory_mb=30.0),
        Row("torch.compile", turns=made_up_turns(8.0, 8.0, 8.0), error=1e-6),
        Row("ours patched", ours=True, turns=made_up_turns(4.0, 4.5, 3.5), error=2e-6),
        Row("openvino", missing="openvino not installed"),
    ]
    made = {"commit": "0123456789ab", "date": "2026-01-01T00:00:00+00:00"}
    return CaseResult(SMALL, 10**9, 10**6, gflops=500.0, gbytes=50.0, source="a test", rows=rows, made=made)


class TestIntervals:
    def test_seven_rounds_cover_the_median_with_all_of_them_and_nine_without_the_outermost(self) -> None:
        found = ratio([2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 3.0], [1.0] * 7)
        assert (found.value, found.low, found.high) == (2.0, 1.8, 3.0)
        assert found.confidence == pytest.approx(1 - 2 / 2**7)
        found = ratio([2.0, 2.2, 1.8, 2.1, 1.9, 2.0, 3.0, 2.0, 1.0], [1.0] * 9)
        assert (found.low, found.high) == (1.8, 2.2)
        assert found.confidence == pytest.approx(1 - 2 * 10 / 2**9)

    def test_the_interval_covers_the_true_median_as_often_as_it_says(self) -> None:
        generator = np.random.default_rng(0)
        tries = [ratio(list(np.exp(generator.normal(size=9))), [1.0] * 9) for _ in range(2000)]
        covered = np.mean([found.low <= 1.0 <= found.high for found in tries])
        assert covered == pytest.approx(tries[0].confidence, abs=0.02)

    def test_a_ratio_is_taken_round_by_round(self) -> None:
        # both are slowed down by the same disturbance, so the ratio is not
        found = ratio([4.0, 8.0, 40.0], [2.0, 4.0, 20.0])
        assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)

    def test_an_interval_that_spans_one_shows_no_difference(self) -> None:
        assert not ratio([1.1, 0.9, 1.2], [1.0] * 3).differs
        assert ratio([1.1, 1.05, 1.2], [1.0] * 3).differs

    def test_rounds_must_match(self) -> None:
        with pytest.raises(ValueError, match="both must have the same rounds, got 1 and 2"):
            ratio([1.0], [1.0, 2.0])

    def test_the_spread_is_half_the_quartiles_distance_over_the_median(self) -> None:
        assert spread([9.0, 10.0, 11.0]) == pytest.approx(0.05)
        assert spread([3.0]) == 0.0


class TestReport:
    def test_figures_follow_from_the_rounds(self) -> None:
        result = made_up_result()
        eager, _, ours, missing = result.rows
        assert eager.median == 10.0
        assert eager.minimum == 8.1
        assert result.floor == 2.0
        assert result.speedup(ours) == 2.5
        assert result.share(ours) == 0.5
        assert result.images_per_second(ours) == 250
        assert missing.median is None
        assert result.lead() == (
            "ours patched is 2.00 (75% interval 1.78 to 2.29) times as fast as torch.compile, the best of the others"
        )

    def test_a_loss_is_said_as_such(self) -> None:
        result = made_up_result()
        result.rows[2].turns = made_up_turns(16.0, 18.0, 14.0)
        assert result.lead() == (
            "torch.compile, the best of the others, is 2.00 (75% interval 1.75 to 2.25) times as fast as ours patched"
        )

    def test_equal_times_are_no_difference(self) -> None:
        result = made_up_result()
        result.rows[2].turns = made_up_turns(7.9, 8.1, 8.0)
        assert result.lead().startswith("no difference between ours patched and torch.compile")

    def test_the_table_shows_what_was_timed_and_the_rest_is_named_with_its_reason(self) -> None:
        result = made_up_result()
        head, rows = result.table()
        assert head == ["runtime", "ms", "+-", "img/s", "MB", "speed-up", "error", "floor"]
        assert rows[0] == ["eager", "10.00", "5%", "100", "30", "1.00x", "1e-06", "20%"]
        assert rows[2] == ["ours patched", "4.00", "6%", "250", "", "2.50x", "2e-06", "50%"]
        assert result.absent() == ["openvino: openvino not installed"]

    def test_the_table_fits_80_columns(self) -> None:
        result = made_up_result()
        result.rows = [
            Row(runtime.name, turns=made_up_turns(12345.67), error=1e-6, memory_mb=12345.0) for runtime in RUNTIMES
        ]
        head, rows = result.table()
        lines = table("", head, rows, width=80).splitlines()
        # a row a line: nothing had to go below its row
        assert len(lines) == 2 + len(rows)
        assert max(map(len, lines)) <= 80

    def test_a_written_report_is_read_back_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        report = Report([made_up_result()], provenance())
        report.write(path)
        assert Report.read(path) == report
        values = json.loads(path.read_text())
        assert values["results"][0]["rows"][2]["median_ms"] == 4.0
        assert values["results"][0]["ratio"]["value"] == 2.0

    def test_a_file_of_another_format_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        path.write_text('{"provenance": {}, "results": [{"rows": [{"name": "eager"}]}]}')
        with pytest.raises(ValueError, match="must have the fields that bench writes, got another format"):
            Report.read(path)

    def test_a_ratio_that_fell_is_a_regression_and_a_slower_machine_is_none(self) -> None:
        before, slower, lost = (Report([made_up_result()], {}) for _ in range(3))
        for row in slower.results[0].rows:
            row.turns = made_up_turns(*(3 * turn.median for turn in row.turns))
        assert regressions(slower, before) == []
        lost.results[0].rows[2].turns = made_up_turns(8.0, 9.0, 7.0)
        assert [line.partition(" was ")[0] for line in regressions(lost, before)] == [
            f"{SMALL.title}: ours patched over eager",
            f"{SMALL.title}: ours patched over torch.compile",
        ]

    def test_a_case_is_done_with_all_its_runtimes_and_measured_again_in_place(self) -> None:
        report = Report([made_up_result()], {})
        assert report.has(SMALL, ["eager", "openvino"])
        assert not report.has(SMALL, ["eager", "litert"])
        assert not report.has(dataclasses.replace(SMALL, threads=2), ["eager"])
        again = made_up_result()
        report.add(again)
        assert report.results == [again]

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

    def test_provenance_shows_no_path_of_this_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["bench", "bench", "conv_small", "--cache", str(tmp_path), "--json", "a.json"])
        expected = f"python -m mnv4_kernels bench conv_small --cache {tmp_path.name} --json a.json"
        assert provenance()["command"] == expected

    def test_provenance_names_command_machine_and_versions(self) -> None:
        facts = provenance()
        assert {"command", "commit", "date", "cpu", "gpu", "energy", "python", "versions"} == set(facts)
        assert facts["versions"]["torch"]
        assert "openvino" in facts["versions"]


class TestCommand:
    def test_bench_writes_json_html_and_markdown_and_prints_the_table(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written, page, tables = tmp_path / "bench.json", tmp_path / "bench.html", tmp_path / "bench.md"
        runtimes = ["--runtimes", "eager", "ours patched", "--rounds", "2", "--seconds", "0"]
        outputs = ["--json", str(written), "--html", str(page), "--markdown", str(tables)]
        assert main(["bench", "conv_small_035", "--size", "64", "--threads", "1", *runtimes, *outputs]) == 0
        printed = capsys.readouterr()
        assert "ours patched is " in printed.out
        assert "floor " in printed.out
        assert "round 2 of 2" in printed.err
        (result,) = json.loads(written.read_text())["results"]
        assert [row["name"] for row in result["rows"]] == ["eager", "ours patched"]
        assert all(row["error"] < 1e-5 for row in result["rows"])
        assert "<svg" in page.read_text()
        lines = tables.read_text().splitlines()
        (head,) = (index for index, line in enumerate(lines) if line.startswith("| runtime |"))
        assert lines[head + 1].startswith("| --- | ---: |")
        cells = [line.strip("| ").split(" | ") for line in lines[head : head + 4]]
        assert [row[0] for row in cells[2:]] == ["eager", "ours patched"]
        assert len({len(row) for row in cells}) == 1

    def test_markdown_shows_a_reason_as_it_is(self) -> None:
        row = Row("onnx_runtime", missing="failed: a|b <unknown> `x`")
        case = CaseResult(Case("mobilenetv4_conv_small", size=64), 1, 1, 1.0, 1.0, "test", [row])
        written = markdown.render(Report([case], {"command": "bench"}))
        assert "onnx\\_runtime: failed: a\\|b \\<unknown\\> \\`x\\`" in written
        assert "| command | bench |" in written

    @pytest.mark.slow
    def test_a_resumed_run_keeps_what_is_there_and_measures_the_rest(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        written = tmp_path / "bench.json"
        command = ["bench", "conv_small_035", "--size", "64", "--runtimes", "eager", "--rounds", "1", "--seconds", "0"]
        assert main([*command, "--threads", "1", "--json", str(written)]) == 0
        (first,) = json.loads(written.read_text())["results"]
        assert main([*command, "--threads", "1", "2", "--json", str(written), "--resume", "--minutes", "0"]) == 0
        assert "stopped before conv_small_035 64px batch 1 float32 2 threads" in capsys.readouterr().err
        assert main([*command, "--threads", "1", "2", "--json", str(written), "--resume"]) == 0
        kept, added = json.loads(written.read_text())["results"]
        assert kept == first
        assert added["case"]["threads"] == 2

    def test_options_that_need_another_are_refused_without_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "conv_small", "--resume"]) == 2
        assert "`--resume` needs --json FILE" in capsys.readouterr().err
        assert main(["bench", "conv_small", "--prepare"]) == 2
        assert "`--prepare` needs --cache DIR" in capsys.readouterr().err

    def test_all_are_timms_twelve(self) -> None:
        cases = cases_of(parser().parse_args(["bench", "all", "--batch", "1", "8", "--dtype", "float32", "bfloat16"]))
        assert len({case.model for case in cases}) == 12
        assert len(set(cases)) == len(cases) == 12 * 2 * 2

    def test_demo_classifies_the_photograph_as_timm_does(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        from mnv4_kernels.cli.demo import classify

        assert classify(Case("mobilenetv4_conv_small_035", size=96, threads=1, photo=True))
        assert "the five best classes agree" in capsys.readouterr().out
