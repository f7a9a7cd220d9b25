"""The command line: what each command prints, and its exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gpus import pretend

from mnv4_kernels import environment
from mnv4_kernels.backends import cuda, native
from mnv4_kernels.cli import main, parser, tune
from mnv4_kernels.cli.arguments import cases_of
from mnv4_kernels.cli.console import progress
from mnv4_kernels.ops.gpu import tune as gpu_tune

pytest.importorskip("timm")

SMALL = ["conv_small_035", "--size", "64", "--threads", "1"]


class TestInfo:
    def test_it_names_the_library_the_tiers_and_every_environment_variable(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["info"]) == 0
        printed = capsys.readouterr().out
        assert ("loaded" if native.available() else "missing: ") in printed
        for name in ("torch", "timm", "triton", *environment.VARIABLES):
            assert name in printed

    def test_json_holds_the_same_facts(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MNV4_KERNELS_DISABLE_MQA", "1")
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["extension"] == native.available()
        assert facts["extension_missing_because"] == native.reasons()
        assert facts["environment"]["MNV4_KERNELS_DISABLE_MQA"] == "1"
        if native.available():
            assert facts["tiers"]["active"] in facts["tiers"]["compiled"]


class TestMisuse:
    def test_an_unknown_model_is_named_with_the_known_ones(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "conv_tiny"]) == 2
        message = capsys.readouterr().err
        assert "`MODEL` must be one of timm's" in message
        assert "mobilenetv4_conv_small" in message
        assert "got 'mobilenetv4_conv_tiny'" in message

    def test_a_size_below_one_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as status:
            main(["bench", "conv_small", "--size", "0"])
        assert status.value.code == 2
        assert "must be at least 1, got 0" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (("--rounds", "0"), "must be at least 1, got 0"),
            (("--batch", "one"), "must be a whole number, got 'one'"),
            (("--seconds", "-1"), "must be at least 0, got -1"),
            (("--minutes", "soon"), "must be a number, got 'soon'"),
            (
                ("--json", "no/such/folder/x.json"),
                "must be a file in a folder that exists, got 'no/such/folder/x.json'",
            ),
            (("--html", "."), "must be a file in a folder that exists, got '.'"),
            (("--against", "no_such.json"), "must be a file, got 'no_such.json'"),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_a_wrong_option_is_refused_before_anything_is_measured(
        self, option: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as status:
            main(["bench", "conv_small", *option])
        assert status.value.code == 2
        assert f"argument {option[0]}: {message}" in capsys.readouterr().err

    def test_an_unknown_runtime_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as status:
            main(["bench", "conv_small", "--runtimes", "abacus"])
        assert status.value.code == 2
        assert "abacus" in capsys.readouterr().err

    def test_a_script_that_is_not_there_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "no_such_script.py"]) == 2
        assert "`script` must be a file, got 'no_such_script.py'" in capsys.readouterr().err

    def test_a_missing_package_is_named_with_the_command_that_installs_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        assert main(["verify", "conv_small"]) == 2
        assert "`verify` needs timm: pip install 'mnv4_kernels[demo]'" in capsys.readouterr().err


class TestVerify:
    def test_a_sound_model_passes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", *SMALL, "--batch", "1", "2"]) == 0
        printed = capsys.readouterr().out
        assert "conv_small_035 64px batch 1" in printed
        assert "conv_small_035 64px batch 2" in printed


class TestTune:
    def test_without_a_gpu_it_says_what_is_missing(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cuda, "reasons", lambda: ("there is no CUDA device",))
        assert main(["tune", *SMALL, "--out", str(tmp_path / "own.json")]) == 2
        assert "tuning needs a GPU that the Triton kernels run on: there is no CUDA device" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_it_times_the_ops_that_a_patched_model_calls_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend(monkeypatch)
        monkeypatch.setattr(tune, "DEVICE", "cpu")
        (case,) = cases_of(parser().parse_args(["tune", "hybrid_medium", "--size", "64", "--out", "own.json"]))
        recorded = {op for op, _ in tune.calls_of(case)}
        assert recorded == {
            "conv_bn_act",
            "conv_pwconv",
            "head",
            "kv_downsample",
            "mqa_projected",
            "pwconv_bn_act",
            "uib",
        }

    def test_the_result_says_what_it_was_run_with_and_a_wrong_kernel_fails_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def tuned(calls: list[Any], path: Path, **facts: Any) -> list[str]:
            noted.append((path, facts["ceilings"], facts["command"]))
            return failures

        noted: list[Any] = []
        failures: list[str] = ["a: out of resources"]
        monkeypatch.setattr(cuda, "reasons", tuple)
        monkeypatch.setattr(gpu_tune, "ceilings", lambda: (3000.0, 700.0))
        monkeypatch.setattr(gpu_tune, "tune", tuned)
        monkeypatch.setattr(tune, "calls_of", lambda case: [])
        command = ["tune", *SMALL, "--out", str(tmp_path / "own.json")]
        assert main(command) == 0
        assert noted[0][:2] == (tmp_path / "own.json", (3000.0, 700.0))
        assert "mnv4_kernels" in noted[0][2]
        failures.append("b: another result than the heuristic's")
        assert main(command) == 1
        assert "b: another result" in capsys.readouterr().err


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["report"].replaced
    assert names["y"].shape == (1, 1000)


class TestRun:
    def test_a_script_gets_its_arguments_and_patched_models(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sys

        import timm

        import mnv4_kernels

        (tmp_path / "helper.py").write_text("ANSWER = 42\n")
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, timm, helper\n"
            "model = timm.create_model('mobilenetv4_conv_small_035')\n"
            "patched = any(type(m).__module__.startswith('mnv4_kernels') for m in model.modules())\n"
            "print(__name__, sys.argv[1:], helper.ANSWER, patched)\n"
        )
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            assert main(["run", str(script), "--epochs", "3"]) == 0
        finally:
            mnv4_kernels.unpatch_timm()
        assert capsys.readouterr().out.strip() == "__main__ ['--epochs', '3'] 42 True"
        model = timm.create_model("mobilenetv4_conv_small_035")
        assert not any(type(module).__module__.startswith("mnv4_kernels") for module in model.modules())


class TestConsole:
    def test_progress_is_a_line_each_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress() as show:
            show("round 1")
            show("round 2")
        assert capsys.readouterr().err == "round 1\nround 2\n"
