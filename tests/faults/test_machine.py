"""A run whose disk refuses, at every event in turn: one sentence, the old output as it was, and --resume to the same
bytes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import typer

import grail
from grail.checkpoint.writer import REPLACED
from grail.guard import guarded
from tests.faults.tally import count
from tests.killed_runs import Case, Events, disk_full, files_of
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
FAULTS = int(os.environ.get("GRAIL_FAULTS", "1"))
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
LASTING = {errno.ENOSPC, errno.EROFS}
"""What stays until somebody mends it."""
SPACE = ("write", "fsync", "mkdir")
"""What takes room on a disk."""


def refusing(number: int) -> Callable[[], None]:
    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def spoken(call: Callable[[], object]) -> tuple[int, list[str]]:
    """The exit code of a command, and the lines that it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            guarded(call)()
        except typer.Exit as stop:
            return stop.exit_code, said.getvalue().splitlines()
    return 0, said.getvalue().splitlines()


@pytest.fixture(scope="module", params=["slimgpt", "fold", "wanda-sp"] if FAULTS > 1 else ["slimgpt"])
def case(request, small_runs_on_one_thread, tmp_path_factory):
    """A run, the files of an undisturbed one, and what that does to its files."""
    with mock.patch.object(grail.workspace, "CHUNK_TOKENS", 4096):
        made = Case(request.param, tmp_path_factory.mktemp("machine"))
        made.source = tiny_checkpoint(made.work / "small", num_hidden_layers=2, shard="20KB")
        (made.source / "LICENSE").write_text("as it is")
        made.flags["overwrite"] = True
        made.compress(made.work / "reference")
        made.files = files_of(made.work / "reference")
        seen = Events(None, False, disk_full)
        (made.work / "out").mkdir()
        (made.work / "out" / "config.json").write_text("old")
        with seen.watching():
            made.compress(made.work / "out")
        made.seen = seen.seen
        yield made


def test_every_event_of_a_run_may_fail(case, tmp_path):
    for number, kind in enumerate(case.seen):
        errors = ERRORS if FAULTS > 1 else ERRORS[number % 3 :][:1]
        if not kind.startswith(SPACE):
            errors = dict.fromkeys(errno.EIO if error == errno.ENOSPC else error for error in errors)
        for error in errors:
            home = tmp_path / f"{number}-{error}"
            trial(case, home, number, error)


def trial(case: Case, home: Path, number: int, error: int) -> None:
    out, where = home / "out", f"event {number}, {case.seen[number]}, {errno.errorcode[error]}"
    out.mkdir(parents=True)
    (out / "config.json").write_text("old")
    events = Events(number, number % 2 == 0, refusing(error), lasting=error in LASTING)
    with events.watching():
        code, said = spoken(lambda: case.compress(out))
    if code == 0:  # a folder that is there though making it failed; something left over that another call took away
        assert case.seen[number] in ("mkdir", "unlink", "rmdir") and files_of(out) == case.files, where
        count("machine", "overcome")
        return
    assert code == 2 and len(said) == 1, where
    assert os.strerror(error) in said[0] or "cannot be taken away" in said[0], where
    olds = [folder / "config.json" for folder in (out, home / "out.partial" / REPLACED)]
    finished = out.exists() and files_of(out).keys() >= case.files.keys()
    assert finished or [old.read_text() for old in olds if old.exists()] == ["old"], where
    kept = case.compress(out, resume=True)
    assert files_of(out) == case.files, where
    assert [file.name for file in home.iterdir()] == ["out"], where
    count("machine", "resumed" if kept["first"] else "begun again")


def test_the_old_output_comes_back_when_the_new_one_cannot_take_its_place(case, tmp_path):
    """Also without --resume, and with an error that does not last."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    renames = [i for i, kind in enumerate(case.seen) if kind == "replace"]
    with Events(renames[-1], False, refusing(errno.EIO)).watching():
        code, _ = spoken(lambda: case.compress(tmp_path / "out"))
    assert code == 2 and (tmp_path / "out" / "config.json").read_text() == "old"
    count("machine", "old output kept")


def test_a_run_cut_off_between_the_two_renames_can_be_begun_anew(case, tmp_path):
    """Killed there: the old output stands aside, and is back before anything is written over it."""
    with Events(case.seen.index("write jsonl"), False, refusing(errno.EIO)).watching():
        spoken(lambda: case.compress(tmp_path / "out"))
    aside = tmp_path / "out.partial" / REPLACED
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("old")
    (tmp_path / "out.partial" / "lock").touch()
    with pytest.raises(grail.GrailError, match=r"not empty.*--overwrite"):
        case.compress(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    case.compress(tmp_path / "out")
    assert files_of(tmp_path / "out") == case.files
    count("machine", "old output kept")
