"""What a machine does to a run beside its disk: no memory, no temporary folder, an input that goes away, a clock that
goes back, requests to stop, a second run, no network."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import grail
from grail.checkpoint import reader, reopen
from grail.checkpoint.reader import SafetensorsFolder
from grail.checkpoint.writer import OutputFolder
from grail.convert import convert
from grail.errors import verdict
from grail.soup import soup
from tests.faults.numeric_cases import DOWN
from tests.faults.tally import count
from tests.faults.test_machine import FAULTS, case, refusing, spoken  # noqa: F401 - case is a fixture
from tests.faults.test_machine_commands import SITES, Net
from tests.killed_runs import Case, Events, files_of
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
MEGABYTE = 2**20


def goes_on(run: Case, out: Path) -> None:
    """--resume gives what an undisturbed run does."""
    run.compress(out, resume=True)
    assert files_of(out) == run.files
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def kept(said: list[str], *words: str) -> None:
    """One sentence with these words, and how to go on."""
    assert len(said) == 1 and all(word in said[0] for word in words), said
    assert "is kept in" in said[0] and said[0].endswith("--resume"), said


def in_a_fork(call: Callable[[], object], said: Path) -> int:
    """The exit code of a command in a process of its own, which writes what it says to a file."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        code, lines = spoken(call)
        said.write_text("\n".join(lines))
        os._exit(code)
    finally:
        os._exit(70)


HELD = []


def leave(megabytes: int) -> None:
    """So much more memory for this process, and no more; what was freed before is taken first."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (most, -1))
    try:
        while True:
            HELD.append(torch.empty(MEGABYTE, dtype=torch.uint8))
    except RuntimeError:
        resource.setrlimit(resource.RLIMIT_AS, (most + megabytes * MEGABYTE, -1))


class Wide(Case):
    """A network whose solves need some 100 MB."""

    def __init__(self, work: Path):
        self.work = work
        self.source = tiny_checkpoint(work / "source", intermediate_size=3000, num_hidden_layers=2)
        ids = tiny_calibration(work / "calibration.safetensors", windows=4, length=32)
        self.flags = {"method": "wanda-sp", "calibration": str(ids), "store": "disk", "ratio": 0.2}


@pytest.fixture(scope="module")
def wide(small_runs_on_one_thread, tmp_path_factory) -> Wide:
    made = Wide(tmp_path_factory.mktemp("wide"))
    made.compress(made.work / "reference")
    made.files = files_of(made.work / "reference")
    return made


@pytest.mark.parametrize("megabytes", [0, 16, 28] if FAULTS < 2 else range(-8, 40, 2))
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "after a layer"])
def test_memory_runs_out(wide, tmp_path, megabytes, late):
    out = tmp_path / "home" / "out"
    out.parent.mkdir()

    def limited() -> None:
        def after(entry: dict) -> None:
            if entry["name"] == "model.layers.0.mlp.down_proj":
                leave(megabytes)

        if not late:
            leave(megabytes)
        wide.compress(out, on_site=after if late else None)

    code = in_a_fork(limited, tmp_path / "said")
    said = (tmp_path / "said").read_text().splitlines()
    assert code == 2 and len(said) == 1 and "out of memory" in said[0] and "--memory" in said[0], (code, said)
    if late:
        kept(said)
    goes_on(wide, out)
    count("machine", "out of memory")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to "
                     "allocate 9216 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=["python", "torch", "cuda", "system"],
)  # fmt: skip
def test_every_library_says_it_its_own_way(error):
    said, code = verdict(error)
    assert code == 2 and said.startswith("out of memory") and "--memory" in said
    assert ("9216" in said or "20.00 GiB" in said) == isinstance(error, RuntimeError)


def test_a_bug_stays_one():
    assert verdict(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert verdict(OSError("no number")) is None


def test_the_check_at_the_end_is_ended_by_the_system(case, tmp_path):  # noqa: F811
    """As where memory runs out: the process that opens the result is killed, and says nothing."""
    killed = mock.Mock(returncode=-signal.SIGKILL, stdout="", stderr="")
    with mock.patch.object(reopen.subprocess, "run", return_value=killed):
        code, said = spoken(lambda: grail.compress(case.source, output=tmp_path / "out", **case.flags))
    assert code == 2
    kept(said, "SIGKILL", "memory")
    goes_on(case, tmp_path / "out")
    count("machine", "killed child")


def test_no_folder_for_temporary_files(case, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    code, said = spoken(lambda: grail.compress(case.source, output=tmp_path / "out", **case.flags))
    assert code == 2
    kept(said, "temporary directory", str(tmp_path / "missing"))
    goes_on(case, tmp_path / "out")
    count("machine", "no temporary folder")


def test_a_full_folder_for_temporary_files(case, tmp_path, monkeypatch):  # noqa: F811
    def write_bytes(path: Path, content: bytes) -> int:
        if "grail-reopen-" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    write = Path.write_bytes
    with mock.patch.object(Path, "write_bytes", write_bytes):
        code, said = spoken(lambda: grail.compress(case.source, output=tmp_path / "out", **case.flags))
    assert code == 2
    kept(said, "No space left", "grail-reopen-")
    goes_on(case, tmp_path / "out")
    count("machine", "no temporary space")


@pytest.mark.parametrize("place", ["model.layers.0.mlp.down_proj", DOWN, "the end"])
def test_the_model_goes_away_in_the_middle(case, tmp_path, place):  # noqa: F811
    away, begun = tmp_path / "away", []

    def vanish(entry: dict) -> None:
        if entry["name"] == (DOWN if place == "the end" else place) and not begun:
            begun.append(True)
            case.source.rename(away)

    flags = {"eval": case.flags["calibration"]} if place == "the end" else {}
    reference = case.files
    if flags:
        case.compress(tmp_path / "with" / "out", **flags)
        reference = files_of(tmp_path / "with" / "out")
    home = tmp_path / "home"
    home.mkdir()
    try:
        code, said = spoken(lambda: case.compress(home / "out", on_site=vanish, **flags))
    finally:
        away.rename(case.source)
    assert code == 2 and len(said) == 1 and str(case.source) in said[0]
    if (home / "out.partial").exists():  # of the first layer nothing is: it was still to be written
        kept(said)
    else:
        assert place == "model.layers.0.mlp.down_proj"
    case.compress(home / "out", resume=True, **flags)
    assert files_of(home / "out") == reference
    count("machine", "input gone")


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN], ids=errno.errorcode.get)
def test_reading_the_model_fails_somewhere(case, tmp_path, error):  # noqa: F811
    """As on a network's disk; after the first layer there is work to keep."""
    reads, get, chunks = itertools.count(), SafetensorsFolder.get, SafetensorsFolder.chunks
    case.compress(tmp_path / "count")

    def failing(read: Callable, at: int) -> Callable:
        def call(*arguments):
            if next(reads) >= at:
                raise OSError(error, os.strerror(error), "the/model")
            return read(*arguments)

        return call

    for at in range(0, 40, 5 if FAULTS < 2 else 1):
        reads, home = itertools.count(), tmp_path / str(at)
        home.mkdir()
        with (
            mock.patch.object(SafetensorsFolder, "get", failing(get, at)),
            mock.patch.object(SafetensorsFolder, "chunks", failing(chunks, at)),
        ):
            code, said = spoken(lambda home=home: case.compress(home / "out"))
        assert code == 2 and len(said) == 1 and os.strerror(error) in said[0] and "the/model" in said[0], (at, said)
        goes_on(case, home / "out")
        count("machine", "input unreadable")


def test_a_slow_input_gives_the_same(case, tmp_path, monkeypatch):  # noqa: F811
    """As of a network's disk: each read waits for a while, and gives little at a time."""
    fill, chance = reader._fill, random.Random(0)

    class Slow:
        def __init__(self, file):
            self.file = file

        def readinto(self, target):
            time.sleep(chance.choice((0, 0, 0.001, 0.004)))
            return self.file.readinto(memoryview(target)[: max(len(target) // 2, 1)])

    monkeypatch.setattr(reader, "_fill", lambda file, target, path: fill(Slow(file), target, path))
    case.compress(tmp_path / "out")
    assert files_of(tmp_path / "out") == case.files
    count("machine", "input slow")


def test_the_clock_goes_back(case, tmp_path, monkeypatch):  # noqa: F811
    backwards = itertools.count(10**6, -60)
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(next(backwards)))
    for file in case.source.iterdir():
        os.utime(file, (4e9, 4e9))
    case.compress(tmp_path / "out")
    assert files_of(tmp_path / "out") == case.files
    count("machine", "clock")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_request_to_stop_at_any_event(case, tmp_path):  # noqa: F811
    for number in range(0, len(case.seen), 4 if FAULTS < 2 else 1):
        home = tmp_path / str(number)
        (home / "out").mkdir(parents=True)
        (home / "out" / "config.json").write_text("old")
        with Events(number, False, interrupt).watching():
            code, said = spoken(lambda home=home: case.compress(home / "out"))
        assert code in (75, 130) and len(said) == 1 and "interrupted" in said[0], (number, code, said)
        if code == 75:
            kept(said)
        assert (home / "out" / "config.json").exists(), number
        goes_on(case, home / "out")
        count("machine", "interrupted")


def test_two_runs_of_any_kind_on_one_output(case, tmp_path):  # noqa: F811
    out, other = tmp_path / "out", tiny_checkpoint(case.work / "other", seed=1, num_hidden_layers=2)
    runs = {
        "compress": lambda: case.compress(out),
        "vision": lambda: grail.compress(Net(), **SITES, output=out, overwrite=True),
        "convert": lambda: convert(case.work / "reference", out, to="padded", overwrite=True),
        "soup": lambda: soup([str(case.source), str(other)], out, overwrite=True),
    }
    with OutputFolder(out):
        for name, run in runs.items():
            code, said = spoken(run)
            assert code == 2 and len(said) == 1 and "another run is working" in said[0], (name, said)
            count("machine", "second run")
    assert not list(tmp_path.iterdir())


def test_a_hub_name_without_a_network_is_refused_at_once(tmp_path):
    begun = time.perf_counter()
    code, said = spoken(lambda: grail.compress("grail-nobody/no-such-model", output=tmp_path / "out"))
    assert code == 2 and len(said) == 1 and "grail-nobody/no-such-model" in said[0]
    assert time.perf_counter() - begun < 60
    count("machine", "no network")
