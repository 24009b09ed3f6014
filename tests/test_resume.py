"""Runs that were interrupted, killed or refused by the disk: what is said, what is kept, and what comes out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import grail
import grail.finish
import grail.session
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import INDEX, JOURNAL, STORE
from grail.cli import app, guarded
from grail.errors import GrailError, Interrupted
from tests.killed_runs import Case, Events, committed_layers, disk_full, files_of, small_runs
from tests.tiny import tiny_calibration, tiny_checkpoint

ROOT = Path(__file__).parents[1]
LINES = ("write jsonl",)
"""The events that are lines of the journal."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_runs():
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By method: a case, and the files of an undisturbed run."""
    made = {}

    def case_of(method: str) -> tuple[Case, dict[str, bytes]]:
        if method not in made:
            case = Case(method, tmp_path_factory.mktemp(method))
            case.probe = case.compress(case.work / "reference")["probe"]
            made[method] = case, files_of(case.work / "reference")
        return made[method]

    return case_of


def interrupt():
    raise KeyboardInterrupt


def interrupted(case: Case, out: Path, lines: int = 3, **flags) -> str:
    """Begin a run and stop it before it writes line number `lines` of its journal; what it says."""
    with Events(lines, False, interrupt, only=LINES).watching(), pytest.raises(Interrupted) as stop:
        case.compress(out, **flags)
    assert not out.exists()
    return str(stop.value)


def flip(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(cases, tmp_path):
    case, files = cases("slimgpt")
    said = interrupted(case, tmp_path / "out")
    assert f"kept in {tmp_path / 'out.partial'}" in said and said.endswith("--resume") and "\n" not in said
    assert committed_layers(tmp_path / "out.partial") == 2
    assert case.compress(tmp_path / "out", resume=True)["first"] == 2
    assert files_of(tmp_path / "out") == files
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_resume_where_nothing_was_begun_begins(cases, tmp_path):
    case, files = cases("slimgpt")
    case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files


def test_resume_of_what_is_done_is_refused_and_leaves_it(cases, tmp_path):
    case, files = cases("wanda-sp")
    case.compress(tmp_path / "out")
    with pytest.raises(GrailError, match="not empty"):
        case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files


def other_weights(case: Case) -> dict:
    name = "model.layers.2.mlp.up_proj.weight"
    shard = case.source / json.loads((case.source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name] * 2}, shard, metadata={"format": "pt"})
    return {}


def other_text(flag: str):
    def change(case: Case) -> dict:
        ids = load_file(case.flags[flag])["input_ids"]
        save_file({"input_ids": ids.flip(1)}, case.flags[flag])
        return {}

    return change


DIFFERENCES = {
    "ratio 0.3, this command has ratio 0.4": lambda case: {"ratio": 0.4},
    "method wanda-sp, this command has method flap": lambda case: {"method": "flap"},
    "compensate True, this command has compensate False": lambda case: {"compensate": False},
    "model sha256": other_weights,
    "calibration sha256": other_text("calibration"),
    "evaluation sha256": other_text("eval"),
}


def test_another_command_is_refused_by_name_and_the_right_one_goes_on(tmp_path):
    case = Case("wanda-sp", tmp_path)
    case.compress(tmp_path / "reference")
    sound = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors") if "reference" not in path.parts}
    interrupted(case, tmp_path / "out")
    for difference, change in DIFFERENCES.items():
        flags = change(case)
        with pytest.raises(GrailError, match=difference) as refusal:
            case.compress(tmp_path / "out", resume=True, **flags)
        assert "kept in" in str(refusal.value) and "\n" not in str(refusal.value)
        for path, content in sound.items():
            path.write_bytes(content)
    assert case.compress(tmp_path / "out", resume=True)["first"] == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")


def test_where_only_a_beginning_was_made_another_command_begins_anew(cases, tmp_path):
    """Nothing was committed, so nothing is lost."""
    case, files = cases("wanda-sp")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    Journal(partial / JOURNAL).append({"step": "start", "identity": {"recipe": {"ratio": 0.9}, "versions": {}}})
    case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files


@pytest.mark.parametrize("tail", [b'{"sum": 1', b'{"step": "shard", "layer": 2}\n', b"\0" * 100])
def test_a_torn_last_line_costs_nothing_more(cases, tmp_path, tail):
    case, files = cases("slimgpt")
    interrupted(case, tmp_path / "out")
    with open(tmp_path / "out.partial" / JOURNAL, "ab") as journal:
        journal.write(tail)
    assert case.compress(tmp_path / "out", resume=True)["first"] == 2
    assert files_of(tmp_path / "out") == files


def shard(partial: Path) -> Path:
    return sorted(partial.glob("model-*"))[0]


def probe_chunk(partial: Path) -> Path:
    return sorted((partial / STORE / "stream-2").iterdir())[-1]


DAMAGE = {
    "shard": lambda partial: flip(shard(partial)),
    "no-shard": lambda partial: shard(partial).unlink(),
    "chunk": lambda partial: flip(probe_chunk(partial)),
    "half-a-chunk": lambda partial: os.truncate(probe_chunk(partial), 200),
    "no-chunk": lambda partial: probe_chunk(partial).unlink(),
    "journal": lambda partial: flip(partial / JOURNAL, (partial / JOURNAL).read_bytes().index(b"crc32") + 9),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_work_is_done_again(cases, tmp_path, kind):
    case, files = cases("slimgpt")
    interrupted(case, tmp_path / "out")
    DAMAGE[kind](tmp_path / "out.partial")
    assert case.compress(tmp_path / "out", resume=True)["first"] == 0
    assert files_of(tmp_path / "out") == files
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_figures_of_damaged_files_are_not_kept(cases, tmp_path):
    """A shard that decays before it is evaluated is written anew, and evaluated anew."""
    case, files = cases("wanda-sp")
    partial = tmp_path / "out.partial"

    def decay() -> None:
        figures = Journal(partial / JOURNAL).find("perplexity")
        if len(figures) == 0 and not Journal(partial / "pruned.partial" / JOURNAL).steps:
            flip(shard(partial))
        if len(figures) == 3:
            interrupt()

    with Events(5, False, decay, lasting=True, only=LINES).watching(), pytest.raises(Interrupted):
        case.compress(tmp_path / "out")
    wrong = Journal(partial / JOURNAL).find("perplexity")[2]["value"]
    assert wrong != json.loads(files["grail.json"])["evaluation"]["perplexity"]["compressed"]
    case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files


def failed(capsys, call) -> str:
    """The one line that is said of a call refused with exit code 2."""
    with pytest.raises(typer.Exit) as refused:
        guarded(call)()
    said = capsys.readouterr().err.splitlines()
    assert refused.value.exit_code == 2 and len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999])
def test_a_full_disk_is_told_and_the_work_goes_on(cases, tmp_path, capsys, share):
    """Full at a write or fsync, and from there on."""
    case, files = cases("slimgpt")
    space = ("write", "fsync", "mkdir")
    counted = Events(None, False, interrupt, only=space)
    with counted.watching():
        case.compress(tmp_path / "all")
    partial = tmp_path / "out.partial"
    torn = random.Random(share).random() < 0.5
    full = Events(int(share * len(counted.seen)), torn, disk_full, lasting=True, only=space)
    with full.watching():
        said = failed(capsys, lambda: case.compress(tmp_path / "out"))
    assert "No space left on device" in said and str(tmp_path) in said
    assert ("--resume" in said) == partial.exists() == Journal(partial / JOURNAL).committed
    committed = committed_layers(partial)
    assert case.compress(tmp_path / "out", resume=True)["first"] >= committed
    assert files_of(tmp_path / "out") == files
    assert {file.name for file in tmp_path.iterdir()} == {"all", "out"}


def test_bad_input_takes_everything_away(tmp_path):
    """No other run could go on with it, though two layers were committed."""
    case = Case("slimgpt", tmp_path / "case")
    name = "model.layers.2.mlp.down_proj.weight"
    file = case.source / json.loads((case.source / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    seen = Events(None, False, interrupt, only=LINES)
    with seen.watching(), pytest.raises(GrailError, match=name):
        case.compress(tmp_path / "deep" / "out")
    assert len(seen.seen) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["case"]


@pytest.mark.parametrize("lines", [2, 4])
def test_widths_are_not_computed_twice(cases, tmp_path, monkeypatch, lines):
    case, files = cases("flap")
    interrupted(case, tmp_path / "out", lines)
    monkeypatch.setattr(grail.session, "survey", lambda *args: pytest.fail("scored the network a second time"))
    assert case.compress(tmp_path / "out", resume=True)["first"] == lines - 2
    assert files_of(tmp_path / "out") == files


def test_perplexities_are_not_measured_twice(cases, tmp_path, monkeypatch):
    case, files = cases("wanda-sp")
    interrupted(case, tmp_path / "out", 11)
    assert [step["of"] for step in Journal(tmp_path / "out.partial" / JOURNAL).find("perplexity")] == [
        "dense",
        "pruned",
    ]
    measured = []
    original = grail.finish.perplexity
    monkeypatch.setattr(grail.finish, "perplexity", lambda *a, **k: measured.append(1) or original(*a, **k))
    found = case.compress(tmp_path / "out", resume=True)
    assert (found["first"], found["probe"]) == (3, case.probe), "the pruned network's states were taken for these"
    assert len(measured) == 1 and files_of(tmp_path / "out") == files


def test_a_run_whose_activations_died_with_it_keeps_nothing(cases, tmp_path):
    case, files = cases("flap")
    with Events(4, False, interrupt, only=LINES).watching(), pytest.raises(KeyboardInterrupt):
        case.compress(tmp_path / "out", store="memory")
    assert not list(tmp_path.iterdir())
    assert case.compress(tmp_path / "out", resume=True, store="memory")["first"] == 0
    assert files_of(tmp_path / "out") == files


def test_without_a_disk_store_the_run_starts_over(cases, tmp_path):
    case, files = cases("flap")
    interrupted(case, tmp_path / "out", 4, store="disk")
    assert case.compress(tmp_path / "out", resume=True, store="memory")["first"] == 0
    assert files_of(tmp_path / "out") == files


def test_a_budget_that_the_begun_chunks_do_not_fit_is_refused_and_nothing_is_lost(cases, tmp_path, monkeypatch):
    case, files = cases("fold")
    interrupted(case, tmp_path / "out")
    with monkeypatch.context() as tight, pytest.raises(GrailError, match=r"--memory 100\.00 GB: the run was begun"):
        tight.setattr(grail.workspace, "CHUNK_TOKENS", 16)
        case.compress(tmp_path / "out", resume=True, memory="100GB")
    assert case.compress(tmp_path / "out", resume=True, memory="100GB")["first"] == 2
    assert files_of(tmp_path / "out") == files


def test_chunks_and_threads_stay_as_they_were_begun_with(cases, tmp_path, monkeypatch):
    """The bits depend on both."""
    case, files = cases("fold")
    interrupted(case, tmp_path / "out")
    monkeypatch.setattr(grail.workspace, "CHUNK_TOKENS", 16)
    torch.set_num_threads(2)
    try:
        assert case.compress(tmp_path / "out", resume=True)["first"] == 2
        assert torch.get_num_threads() == 2, "the caller's own setting is not given back"
    finally:
        torch.set_num_threads(1)
    assert files_of(tmp_path / "out") == files


@pytest.fixture(scope="module")
def killing(tmp_path_factory):
    """A process that kills runs while the other tests go on."""
    work = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.killed_runs", "--trials", "5", "--timed", "1", "--seed", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(work)}
    with (
        open(work / "found", "w") as found,
        open(work / "said", "w") as said,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=found, stderr=said) as process,
    ):
        yield process, work
        process.kill()


class Process:
    """Real runs, `grail compress`, to the same output each time."""

    def __init__(self, work: Path):
        self.out, self.partial = work / "out", work / "out.partial"
        self.source = tiny_checkpoint(work / "source", num_hidden_layers=3)
        ids = str(tiny_calibration(work / "ids.safetensors", windows=32, length=64))
        self.flags = {"calibration": ids, "eval": ids, "ratio": 0.4}
        self.command = ["compress", "--model", str(self.source), "--output", str(self.out)]
        self.command += [word for flag, value in self.flags.items() for word in (f"--{flag}", str(value))]

    def start(self, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "grail", *self.command, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    def refused(self) -> str:
        """The one line that the same command says now, in this process."""
        result = CliRunner().invoke(app, self.command)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    def end(self, process: subprocess.Popen, code: int, signalled: int = 0) -> str:
        """The last line that it says, having ended with this exit code."""
        process.send_signal(signalled)
        said = process.communicate()[1]
        if signalled and not process.returncode:
            pytest.skip("the run was over before the signal was seen")
        assert process.returncode == code, said
        return said.splitlines()[-1]

    def steps(self) -> int:
        return len(Journal(self.partial / JOURNAL).steps)

    def wait_for(self, process: subprocess.Popen, steps: int) -> None:
        while process.poll() is None and self.steps() < steps:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()


def test_signals_a_second_run_and_going_on_in_real_processes(tmp_path, monkeypatch, reopen_here, killing):
    run = Process(tmp_path)
    first = run.start()
    run.wait_for(first, steps=2)
    first.send_signal(signal.SIGSTOP)
    assert "another run is working" in run.refused()
    first.send_signal(signal.SIGCONT)
    said = run.end(first, 75, signal.SIGINT)
    assert str(run.partial) in said and said.endswith("--resume")
    done = run.steps()
    said = run.refused()
    assert "--resume" in said and "--overwrite" in said and run.steps() == done
    second = run.start("--resume")
    run.wait_for(second, steps=done + 1)
    assert run.end(second, 75, signal.SIGTERM).endswith("--resume")
    monkeypatch.setattr(grail.workspace, "CHUNK_TOKENS", 4096)
    grail.compress(run.source, output=run.out, resume=True, **run.flags)
    grail.compress(run.source, output=tmp_path / "undisturbed", **run.flags)
    assert files_of(run.out) == files_of(tmp_path / "undisturbed")
    assert not run.partial.exists()


def test_kills_at_any_point_end_in_the_same_bytes(killing):
    """Some thirty here; `python -m tests.killed_runs` tries every event."""
    process, work = killing
    code, found = process.wait(), (work / "found").read_text()
    assert code == 0, found + (work / "said").read_text()
    tried = json.loads(found)["methods"].values()
    assert sum(found["kills"] for found in tried) >= 25 and sum(found["gone on with"] for found in tried) >= 10
