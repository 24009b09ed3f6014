"""Runs that were interrupted, killed or refused by the disk: what is said, what is kept, and what comes out."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import grail
import grail.finish
import grail.session
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import INDEX, JOURNAL, STORE
from grail.cli import app
from grail.errors import GrailError, Interrupted
from grail.guard import guarded
from tests.killed_runs import Case, Events, committed_layers, disk_full, files_of

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
LINES = ("write jsonl",)
"""The events that are lines of the journal."""


@pytest.fixture(scope="module")
def cases(small_runs_on_one_thread, tmp_path_factory):
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


def test_stopped_before_it_goes_on_the_work_is_still_there(cases, tmp_path, monkeypatch):
    case, files = cases("slimgpt")
    line = ["compress", "--model", str(case.source), "--output", str(tmp_path / "out"), "--resume"]

    def stopped() -> Result:
        with monkeypatch.context() as patch:
            patch.setattr("grail.run.Session", Mock(side_effect=KeyboardInterrupt))
            return CliRunner().invoke(app, line)

    assert (nothing := stopped()).exit_code == 130 and "nothing new was kept" in nothing.output
    interrupted(case, tmp_path / "out")
    assert (kept := stopped()).exit_code == 75 and f"kept in {tmp_path / 'out.partial'}" in kept.output
    assert case.compress(tmp_path / "out", resume=True)["first"] == 2
    assert files_of(tmp_path / "out") == files


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
    monkeypatch.setattr(grail.session, "score_survey", lambda *args: pytest.fail("scored the network a second time"))
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
