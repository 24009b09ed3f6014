"""Committed steps: what is on disk when, what a torn or damaged line costs, and what becomes of a folder of work."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from grail.checkpoint.background import Background
from grail.checkpoint.journal import START, Journal
from grail.checkpoint.pieces import Piece
from grail.checkpoint.writer import JOURNAL, LOCK, STORE, OutputFolder
from grail.distributed import Group
from grail.errors import Circumstance, GrailError
from grail.profile import Profile
from tests.killed_runs import Events, disk_full

STEPS = [
    {"step": START, "threads": 2, "ratio": 0.1 + 0.2},
    {"step": "widths", "kept": {"größe\n": 3, "b": [1, 2]}},
    {"step": "shard", "file": "a", "crc32": 7, "rcond": float("inf"), "sum": 1},
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / JOURNAL


def written(path: Path, steps=STEPS) -> Journal:
    journal = Journal(path)
    for step in steps:
        journal.append(step)
    return journal


def shard(number: int) -> tuple[str, list[Piece]]:
    return f"model-{number}.safetensors", [Piece.of("x", torch.full((4,), float(number)))]


def begun(path: Path, shards: int = 1) -> None:
    """What a run leaves that was interrupted after its first layers."""
    with pytest.raises(KeyboardInterrupt), OutputFolder(path, keep=True) as out:
        out.journal.append({"step": START})
        for number in range(shards):
            out.write_shard(*shard(number), layer=number)
        (out.partial / STORE).mkdir()
        (out.partial / "half.tmp").write_text("torn")
        raise KeyboardInterrupt


def test_steps_come_back_as_they_were_written(path):
    assert written(path).steps == Journal(path).steps == STEPS
    assert Journal(path).find("widths") == STEPS[1:2]
    assert Journal(path.with_name("none")).steps == []


def test_each_line_is_json_that_others_can_read(path):
    written(path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in found] == [step["step"] for step in STEPS]


def test_a_step_is_on_disk_before_the_next_one_begins(path, monkeypatch):
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda file: on_disk.append(path.stat().st_size))
    for count, step in enumerate(STEPS, 1):
        journal = Journal(path)
        journal.append(step)
        assert len(on_disk) == count and on_disk[-1] == path.stat().st_size


def test_work_to_go_on_with_is_a_beginning_and_something_more(path):
    assert not Journal(path).committed
    assert not written(path, STEPS[:1]).committed
    assert written(path, STEPS[1:2]).committed
    assert not written(path.with_name("no beginning"), STEPS[1:]).committed


def test_a_line_cut_off_anywhere_is_no_step_and_is_taken_away(path):
    whole = len(written(path, STEPS[:2]) and path.read_bytes())
    content = written(path, STEPS[2:]) and path.read_bytes()
    for length in range(whole, len(content)):
        path.write_bytes(content[:length])
        journal = Journal(path)
        assert journal.steps == STEPS[:2], length
        journal.append(STEPS[2])
        assert path.read_bytes() == content


def test_every_damaged_byte_ends_the_journal_there(path):
    written(path)
    content = path.read_bytes()
    ends = [len(b"".join(content.splitlines(keepends=True)[:count])) for count in range(4)]
    for place in range(len(content)):
        for change in (1, 4, 128):
            path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
            left = Journal(path).steps
            assert left == STEPS[: sum(end <= place for end in ends) - 1], (place, change)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("event", [0, 1, 2])
def test_a_step_that_found_no_room_can_be_committed_later(path, event, torn):
    journal = written(path, STEPS[:1])
    with Events(event, torn, disk_full).watching(), pytest.raises(OSError) as refusal:
        journal.append(STEPS[1])
    assert (refusal.value.errno, refusal.value.filename) == (errno.ENOSPC, str(path))
    assert journal.steps == STEPS[:1]
    journal.append(STEPS[2])
    assert Journal(path).steps == [STEPS[0], STEPS[2]]


def test_steps_are_taken_back(path):
    """With all that followed from them."""
    journal = written(path)
    journal.rewind(lambda step: step["step"] != "widths")
    assert journal.steps == Journal(path).steps == STEPS[:1]
    journal.append(STEPS[2])
    assert Journal(path).steps == [STEPS[0], STEPS[2]]
    journal.rewind(lambda step: True)
    assert journal.steps == Journal(path).steps == [STEPS[0], STEPS[2]]
    journal.rewind(lambda step: False)
    assert journal.steps == Journal(path).steps == []
    journal.append(STEPS[0])
    assert Journal(path).steps == STEPS[:1]
    assert [file.name for file in path.parent.iterdir()] == [JOURNAL]


def test_taking_back_is_done_or_not_done(path):
    """Cut off anywhere within, the journal is the old one or the new one."""
    for event in range(4):
        for torn in (False, True):
            path.unlink(missing_ok=True)
            journal = written(path)
            with Events(event, torn, disk_full).watching():
                try:
                    journal.rewind(lambda step: step["step"] != "widths")
                except OSError:
                    assert Journal(path).steps in (STEPS, STEPS[:1]), (event, torn)
                    assert event < 3
                else:
                    assert Journal(path).steps == STEPS[:1] and event == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_shards_are_committed_in_order_and_then_given_up(tmp_path, enabled):
    said = []
    with OutputFolder(tmp_path / "out", keep=True) as out:
        with Background(out, Group.solo(), Profile(), enabled=enabled) as background:
            for number in range(3):
                background.write(*shard(number), lambda n=number: said.append(n), layer=number)
                assert said == list(range(number + (not enabled)))
            background.settle()
            background.settle()
        assert said == [0, 1, 2]
        assert [step["layer"] for step in out.journal.steps] == [0, 1, 2]
        assert out.total_parameters == 12


def test_what_was_being_written_is_committed_when_another_thing_fails(tmp_path):
    """It is whole: the next run need not compute it again. What `then` gives up stays."""
    given_up, slow = [], threading.Event()
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out", keep=True) as out:
        out.journal.append({"step": START})
        file, (piece,) = shard(0)

        def chunks():
            slow.wait(10)
            yield from piece.chunks

        with Background(out, Group.solo(), Profile()) as background:
            background.write(
                file, [Piece(piece.name, piece.dtype, piece.shape, chunks())], lambda: given_up.append(0), layer=0
            )
            threading.Timer(0.2, slow.set).start()
            raise KeyboardInterrupt
    assert [step.get("layer") for step in Journal(out.partial / JOURNAL).steps] == [None, 0]
    assert (out.partial / file).exists() and not given_up


def test_a_shard_that_finds_no_room_is_told_and_not_committed(tmp_path):
    with pytest.raises(OSError) as refusal, OutputFolder(tmp_path / "out", keep=True) as out:
        events = Events(0, True, disk_full, lasting=True, only=("write",))
        with events.watching(), Background(out, Group.solo(), Profile()) as background:
            background.write(*shard(0), lambda: pytest.fail("given up, but not written"), layer=0)
            background.settle()
    assert refusal.value.errno == errno.ENOSPC and refusal.value.filename.endswith("model-0.safetensors.tmp")
    assert not list(tmp_path.iterdir()), "nothing was committed, nothing may be left"


def test_a_run_that_goes_on_finds_only_what_was_committed(tmp_path):
    begun(tmp_path / "out")
    assert (tmp_path / "out.partial" / "half.tmp").exists()
    with OutputFolder(tmp_path / "out", keep=True, resume=True) as out:
        assert {file.name for file in out.partial.iterdir()} == {LOCK, JOURNAL, STORE, "model-0.safetensors"}
        assert out.recall(out.journal.steps[1]) and out.weight_map == {"x": "model-0.safetensors"}
        assert out.written == {"x": ("F32", [4])} and (out.total_parameters, out.total_bytes) == (4, 16)


def test_a_shard_that_is_not_what_it_was_is_not_recalled(tmp_path):
    begun(tmp_path / "out")
    file = tmp_path / "out.partial" / "model-0.safetensors"
    sound = file.read_bytes()
    for content in (sound[:-1], sound + b"\0", sound[:-1] + bytes([sound[-1] ^ 1]), b""):
        file.write_bytes(content)
        out = OutputFolder(tmp_path / "out", keep=True, resume=True)
        assert not out.recall(out.journal.steps[1]) and not out.weight_map
    file.unlink()
    assert not out.recall(out.journal.steps[1])


def test_a_beginning_alone_is_not_gone_on_with(tmp_path):
    begun(tmp_path / "out", shards=0)
    assert not (tmp_path / "out.partial").exists()
    killed = tmp_path / "out.partial"
    (killed / STORE).mkdir(parents=True)
    written(killed / JOURNAL, STEPS[:1])
    with OutputFolder(tmp_path / "out", keep=True, resume=True) as out:
        assert out.journal.steps == [] and {file.name for file in out.partial.iterdir()} == {LOCK}


@pytest.mark.parametrize("resume", [False, True])
def test_work_is_never_thrown_away_unasked(tmp_path, resume):
    begun(tmp_path / "out")
    if not resume:
        with pytest.raises(GrailError, match=r"--resume .* --overwrite"), OutputFolder(tmp_path / "out", keep=True):
            pytest.fail("began anew")
    assert len(Journal(tmp_path / "out.partial" / JOURNAL).steps) == 2
    with OutputFolder(tmp_path / "out", keep=True, resume=resume, overwrite=not resume) as out:
        assert len(out.journal.steps) == (2 if resume else 0)


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (KeyboardInterrupt(), True),
        (RuntimeError("a bug"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (Circumstance("another process died"), True),
        (GrailError("a weight is NaN"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_bad_input_takes_committed_work_away(tmp_path, error, left):
    with pytest.raises(type(error)), OutputFolder(tmp_path / "deep" / "er" / "out", keep=True) as out:
        out.journal.append({"step": START})
        out.write_shard(*shard(0))
        raise error
    assert out.kept == out.partial.exists() == left
    assert (tmp_path / "deep").exists() == left


def test_a_line_that_was_written_as_the_interruption_came_counts(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out", keep=True) as out:
        out.journal.append({"step": START})
        with Events(0, True, interrupt, only=("fsync",)).watching():
            out.commit_shard(*shard(0), 7)
    assert out.kept and Journal(out.partial / JOURNAL).find("shard")


def test_a_second_run_is_told_that_the_first_works(tmp_path):
    """With and without committed work, and whatever it was asked; and it says nothing of work that it keeps."""
    with OutputFolder(tmp_path / "out", keep=True) as first:
        for committed in (False, True):
            for resume in (False, True):
                second = OutputFolder(tmp_path / "out", keep=True, resume=resume)
                with pytest.raises(GrailError, match="another run is working"), second:
                    pytest.fail("two runs in one folder")
                assert not second.kept
            if not committed:
                first.journal.append({"step": START})
                first.write_shard(*shard(0))
        assert (first.partial / "model-0.safetensors").exists()


def test_where_no_file_can_be_made_no_folder_is_left(tmp_path, monkeypatch):
    from grail.checkpoint import disk

    def refuse(path, mode="r", **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(disk, "open", refuse, raising=False)
    with pytest.raises(GrailError, match="No space left"), OutputFolder(tmp_path / "deep" / "out"):
        pytest.fail("began")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("replaces", [False, True])
def test_finishing_can_be_cut_off_anywhere(tmp_path, replaces):
    """Afterwards the output is whole, or a run with --resume finds the committed steps again."""

    def stop():
        raise RuntimeError("cut off")

    for number in range(40):
        path = tmp_path / str(number) / "out"
        if replaces:
            path.mkdir(parents=True)
            (path / "config.json").write_text("old")
        events = Events(None, False, stop)
        try:
            with OutputFolder(path, keep=True, overwrite=replaces) as out:
                out.journal.append({"step": START})
                out.write_shard(*shard(0), layer=0)
                (out.partial / STORE / "x").mkdir(parents=True)
                (out.partial / STORE / "x" / "0").write_text("chunk")
                events.fatal = number
                with events.watching():
                    out.finish()
            cut_off = False
        except RuntimeError:
            cut_off = True
        if cut_off and (out.partial.exists() or (path / JOURNAL).exists()):
            with OutputFolder(path, keep=True, overwrite=replaces, resume=True) as out:
                assert out.recall(out.journal.find("shard")[0])
                out.finish()
        assert [file.name for file in path.iterdir()] == ["model-0.safetensors"], events.seen
        assert [file.name for file in path.parent.iterdir()] == ["out"]
        if not cut_off:
            assert number > 5
            return
    pytest.fail("never came to the end")


def test_a_run_that_is_still_finishing_is_not_disturbed(tmp_path):
    path = tmp_path / "out"
    with OutputFolder(path, keep=True) as first:
        first.journal.append({"step": START})
        first.write_shard(*shard(0), layer=0)
        os.replace(first.partial, path)  # the first half of finish()
        with pytest.raises(GrailError, match="another run"), OutputFolder(path, keep=True, resume=True):
            pytest.fail("two runs in one folder")
        assert (path / "model-0.safetensors").exists() and not first.partial.exists()
