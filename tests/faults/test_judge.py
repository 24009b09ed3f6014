"""The judge itself: each of its detectors fires, and a case that does nothing wrong passes."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grail.errors import GrailError
from tests.faults import judge as judges
from tests.faults import tally
from tests.faults.judge import CANARY, Misjudged, blames_what_was_asked, judge

KIND = "the judge itself"


class Called:
    def __reduce__(self):
        return (os.getcwd, ())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "count", lambda *args: None)
    case = tmp_path / "case"
    case.mkdir()
    (case / "evil.py").write_text("x = 1\n")
    (case / "input.bin").write_bytes(pickle.dumps(Called()))
    return case


def write(path):
    Path(path).write_text("x")


def imported(path):
    spec = importlib.util.spec_from_file_location("evil", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def refuse_after(act):
    def run():
        act()
        raise GrailError("input.bin is bad")

    return run


def out_of_memory():
    try:
        torch.empty(2**40, dtype=torch.uint8)
    except RuntimeError as error:
        raise GrailError("input.bin is bad") from error


def hang_and_swallow():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(1)


def raises(error):
    def run():
        raise error

    return run


WRONG = {
    "another-exception": (lambda f: raises(KeyError("x")), "raised KeyError"),
    "an-exit": (lambda f: raises(SystemExit(1)), "raised SystemExit"),
    "two-lines": (lambda f: raises(OSError(errno.ENOSPC, "full", "input.bin\nx")), "not one line"),
    "no-name": (lambda f: raises(GrailError("something is bad")), "names neither"),
    "hang": (lambda f: hang_and_swallow, "still at work"),
    "memory": (lambda f: lambda: bytearray(2**40), "more memory"),
    "memory-of-torch": (lambda f: lambda: torch.ones(2**33), "more memory"),
    "memory-behind-a-refusal": (lambda f: out_of_memory, "more memory"),
    "write-beside": (lambda f: lambda: write(f / "stray"), "outside of the output"),
    "write-elsewhere": (lambda f: lambda: write(f.parent / "stray"), "outside of the output"),
    "write-by-a-library": (lambda f: lambda: save_file({"x": torch.ones(1)}, f / "stray"), "stray was changed"),
    "rename": (lambda f: lambda: os.rename(f / "input.bin", f / "other"), "os.rename"),
    "remove": (lambda f: lambda: (f / "input.bin").unlink(), "os.remove"),
    "folder": (lambda f: lambda: (f.parent / "stray").mkdir(), "os.mkdir"),
    "link-elsewhere": (lambda f: lambda: (f.parent / "stray").symlink_to("x"), "os.symlink"),
    "temporary": (lambda f: lambda: tempfile.mkdtemp(prefix="left"), "left behind"),
    "half-an-output": (lambda f: refuse_after(lambda: write(f / "out")), "out was changed"),
    "a-system-call": (lambda f: lambda: os.system("true"), "os.system"),
    "a-process": (lambda f: lambda: subprocess.run(["true"]), "subprocess.Popen"),
    "a-pickle": (lambda f: lambda: pickle.loads((f / "input.bin").read_bytes()), "a pickle named"),
    "code": (lambda f: lambda: runpy.run_path(str(f / "evil.py")), "evil.py"),
    "an-import": (lambda f: lambda: imported(f / "evil.py"), "evil.py"),
    "an-evaluation": (lambda f: lambda: eval(f"'{CANARY}'"), "compiled"),
    "the-network": (lambda f: lambda: socket.getaddrinfo("localhost", 80), "socket.getaddrinfo"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_detector_fires(folder, wrong):
    act, complaint = WRONG[wrong]
    with pytest.raises(Misjudged, match=complaint):
        judge(
            KIND, act(folder), folder, names=["input.bin"], output=folder / "out", seconds=1 if wrong == "hang" else 9
        )


def test_what_is_allowed(folder):
    output = folder / "out"

    def work():
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "x")
        (folder / "out.partial").mkdir()
        write(folder / "out.partial" / "x")
        os.replace(folder / "out.partial", output)
        return torch.ones(2**20).sum()

    assert judge(KIND, work, folder, names=(), output=output).value == 2**20
    shutil.rmtree(output)
    made_and_removed = refuse_after(lambda: (write(output), output.unlink()))
    assert judge(KIND, made_and_removed, folder, names=["input.bin"], output=output).refused == "input.bin is bad"


def test_the_line_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(tally, "_seen", tally.Counter())
    assert tally.line() is None
    for kind, outcome, number in (("config", "refused", 1200), ("gguf", "accepted and right", 2)):
        for _ in range(number):
            tally.count(kind, outcome)
    assert tally.line() == "faults: 1,202 cases: config 1,200, gguf 2, refused 1,200, accepted and right 2"


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("--head-multiple 2: no such number; leave out --format", True),
        ("--format uniform: add --head-multiple 1", False),
        ("o_proj: the numbers cannot be computed", False),
        ("--method flap: no such method", False),
    ],
)
def test_a_refusal_blames_an_option_that_was_asked_for(sentence, right):
    assert blames_what_was_asked(sentence, {"head_multiple": 2, "method": "flap"}) == right
