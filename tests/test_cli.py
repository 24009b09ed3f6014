"""The command line: output for people, for programs, and for files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from grail.cli import app
from tests.tiny import tiny_calibration, tiny_checkpoint

runner = CliRunner()
TIMED = {"run.json", "report.html"}
"""What holds times and differs between equal runs."""


def grail(*arguments, **environment):
    """A real process, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "grail", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def job(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    calibration = tiny_calibration(tmp_path / "calibration.safetensors")
    return ["compress", "--model", source, "--calibration", calibration, "--output", tmp_path / "out"]


def test_a_real_process_compresses_and_reopens(job, tmp_path):
    done = grail(*job, "--ratio", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["run"]["reopened"]["logit_difference"] < 1e-5
    assert document == document | json.loads((tmp_path / "out" / "grail.json").read_text())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "grail.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "recipe.yaml",
        "report.html",
        "run.json",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_without_a_terminal_there_are_no_bars_and_no_colours(job):
    done = grail(*job, NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert "\x1b" not in text and "\r" not in text and "━" not in text
    assert "224 calibration tokens and 1 window to choose by; about" in done.stderr.splitlines()[0]
    assert "compressing: layer 2 of 2" in done.stderr
    assert "loads with     AutoModelForCausalLM.from_pretrained(" in done.stdout


def test_quiet_says_only_the_result(job, reopen_here):
    done = runner.invoke(app, [str(a) for a in job] + ["--quiet"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "parameters" in done.stdout


def test_equal_runs_write_equal_bytes(job, tmp_path, reopen_here):
    contents = []
    for name in ("first", "second"):
        output = tmp_path / name / "out"  # the model card has the folder's own name
        arguments = [str(a) for a in job[:-1]] + [str(output), "--quiet"]
        assert runner.invoke(app, arguments).exit_code == 0
        files = sorted(file for file in output.iterdir() if file.name not in TIMED)
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]


def test_json_of_compress_and_eval_is_one_document(job, tmp_path, reopen_here):
    arguments = [str(a) for a in job]
    calibration = arguments[arguments.index("--calibration") + 1]
    done = runner.invoke(app, [*arguments, "--eval", calibration, "--seq-len", "32", "--compare-pruned", "--json"])
    assert done.exit_code == 0, done.output
    perplexity = json.loads(done.stdout)["evaluation"]["perplexity"]
    assert set(perplexity) == {"dense", "pruned", "compressed"}
    again = runner.invoke(app, ["eval", str(tmp_path / "out"), "--json"])
    assert again.exit_code == 0, again.output
    (found,) = json.loads(again.stdout)["models"].values()
    assert found["perplexity"] == pytest.approx(perplexity["compressed"], rel=1e-6)


def test_resume_leaves_a_finished_output_as_it_is(job, tmp_path, reopen_here):
    arguments = [str(a) for a in job]
    assert runner.invoke(app, [*arguments, "--quiet"]).exit_code == 0
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "out").iterdir()}
    again = runner.invoke(app, [*arguments, "--resume", "--json"])
    assert again.exit_code == 0 and "is finished" in again.stderr
    document = json.loads(again.stdout)
    assert document["output"] == str(tmp_path / "out") and document["run"] and document["sites"]
    assert before == {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "out").iterdir()}
    assert runner.invoke(app, arguments).exit_code == 2
    other = runner.invoke(app, [*arguments, "--resume", "--seed", "1"])
    assert other.exit_code == 2 and "not empty" in other.stderr


def test_compare_pruned_is_what_no_compensate_gives(job, tmp_path, reopen_here):
    """On the same windows: those that --target stream keeps to choose by are not there for either."""
    arguments = [str(a) for a in job] + ["--target", "hidden"]
    evaluation = ["--eval", arguments[arguments.index("--calibration") + 1], "--json", "--overwrite"]
    both = json.loads(runner.invoke(app, [*arguments, *evaluation, "--compare-pruned"]).stdout)
    alone = json.loads(runner.invoke(app, [*arguments, *evaluation, "--no-compensate"]).stdout)
    assert both["evaluation"]["perplexity"]["pruned"] == alone["evaluation"]["perplexity"]["compressed"]


def test_methods_lists_each_method_and_its_needs():
    done = runner.invoke(app, ["methods", "--json"])
    methods = json.loads(done.stdout)["methods"]
    assert {"mag-sp", "wanda-sp", "random"} <= set(methods)
    assert methods["mag-sp"]["needs"] == []
    assert "wanda-sp" in runner.invoke(app, ["methods"]).stdout
    assert "activation" in runner.invoke(app, ["methods", "wanda-sp"]).stdout


def test_version_and_help():
    assert runner.invoke(app, ["--version"]).stdout.startswith("grail 0.")
    text = runner.invoke(app, ["compress", "--help"], env={"COLUMNS": "200"}).stdout
    for option in ("--model", "--method", "--ratio", "--ridge-form", "--compare-pruned", "--gqa", "--set"):
        assert option in text


def test_help_does_not_wait_for_torch():
    code = "import sys, grail, grail.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_bug_of_ours_is_called_one(job, monkeypatch, reopen_here):
    from grail import pipeline

    monkeypatch.setattr(pipeline, "_compress_layer", lambda *_: 1 / 0)
    done = runner.invoke(app, [str(a) for a in job])
    assert done.exit_code == 1
    assert "bug in grail" in done.stderr


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_says_otherwise(given, used):
    code = (
        "import atexit, os, sys; atexit.register(lambda: print('policy', os.environ.get('OMP_WAIT_POLICY')));"
        "sys.argv = ['grail', '--version']; from grail.cli import main; assert 'torch' not in sys.modules; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert f"policy {used}" in done.stdout
