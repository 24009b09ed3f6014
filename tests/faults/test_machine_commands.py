"""The shorter commands and vision networks on a disk that refuses: one sentence, no half of an output, the old one as
it was, and afterwards the same command works."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import grail
from grail.convert import convert
from grail.modules.export import export
from grail.page import write_report
from grail.serving.gguf import export_gguf
from grail.soup import soup
from tests.faults.numeric_cases import no_reopening
from tests.faults.tally import count
from tests.faults.test_machine import ERRORS, FAULTS, refusing, spoken
from tests.killed_runs import Events, disk_full
from tests.test_gguf_export import byte_level, with_tokenizer
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


IMAGES = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
SITES = {"sites": [grail.channels("up", "down", width=64)], "calibration": IMAGES}


@pytest.fixture(scope="module")
def commands(small_runs_on_one_thread, tmp_path_factory) -> Iterator[dict[str, tuple[str, Callable]]]:
    """By name: what the output is called, and the command."""
    work = tmp_path_factory.mktemp("commands")
    data = str(tiny_calibration(work / "ids.safetensors"))
    dense = [
        tiny_checkpoint(work / name, num_key_value_heads=6, vocab_size=400, seed=seed) for seed, name in enumerate("ab")
    ]
    for folder in dense:
        with_tokenizer(folder, byte_level())
    files = []
    for seed in range(2):
        files.append(str(work / f"{seed}.safetensors"))
        save_file({"a": torch.full((300,), float(seed))}, files[-1])
    with no_reopening():
        small = work / "small"
        grail.compress(dense[0], output=small, calibration=data, eval="none", attn_ratio=0.34, mlp_ratio=0.3)
        loaded = tiny_model()
        again = {"overwrite": True}
        yield {
            "vision": ("out", lambda out: grail.compress(Net(), **SITES, output=out, **again)),
            "loaded": ("out", lambda out: grail.compress(loaded, output=out, calibration=data, **again)),
            "convert": ("out", partial(convert, small, to="padded", **again)),
            "gguf": ("out.gguf", partial(export_gguf, small, **again)),
            "torch-export": ("out.pt2", lambda out: export(Net().eval(), IMAGES[:1], "torch-export", out, **again)),
            "onnx": ("out.onnx", lambda out: export(Net().eval(), IMAGES[:1], "onnx", out, **again)),
            "soup": ("out", partial(soup, [str(folder) for folder in dense], **again)),
            "soup of files": ("out.safetensors", partial(soup, files, **again)),
            "report": ("out.html", lambda out: write_report([str(small)], str(out), **again)),
        }


NAMES = ("vision", "loaded", "convert", "gguf", "torch-export", "onnx", "soup", "soup of files", "report")


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Every library meets an error of the system when it writes more, whatever language it is in."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Files but those that hold times."""
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None
        for file in folder.rglob("*")
        if file.name not in ("run.json", "report.html", "README.md", "out.pt2", "out.onnx")
    }


class Workplace:
    """A folder in which a command has been carried out once."""

    def __init__(self, folder: Path, name: str, command: Callable):
        self.folder, self.out, self.command = folder, folder / name, command
        seen = Events(None, False, disk_full)
        command(self.out)
        with seen.watching():
            command(self.out)
        self.events, self.files = seen.seen, listing(folder)
        made = [self.out] if self.out.is_file() else [f for f in self.out.rglob("*") if f.is_file()]
        self.largest = max(file.stat().st_size for file in made)

    def fails(self, fault, where: str, *, late: bool = False) -> None:
        """The command, in a context that is to make it fail. late: when the output has its name already."""
        with fault:
            code, said = spoken(lambda: self.command(self.out))
        assert (code, len(said)) in ((0, 0), (2, 1)), (where, code, said)
        found = listing(self.folder)
        if late or "is kept in" in "".join(said):
            assert found.items() >= self.files.items(), where
        else:
            assert found == self.files, where
        count("machine", "refused" if code else "overcome")


@pytest.fixture
def place(request, commands, tmp_path) -> Workplace:
    return Workplace(tmp_path, *commands[request.param])


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_a_file_cannot_be_written_whole(place):
    for size in {0, 1, 100, place.largest // 2, place.largest - 1}:
        place.fails(files_no_longer_than(size), f"files of {size} bytes at most")
    place.command(place.out)
    assert listing(place.folder) == place.files


@pytest.mark.parametrize("place", [n for n in NAMES if FAULTS > 1 or n != "loaded"], indirect=True)
def test_every_event_may_fail(place):
    """With an error that does not last: so that nothing is in the way of putting things back."""
    for number, kind in enumerate(place.events):
        error = ERRORS[number % 3]
        events = Events(number, kind.startswith("write") and number % 2 == 0, refusing(error))
        late = "replace" not in place.events[number:]
        place.fails(events.watching(), f"event {number}, {kind}, {errno.errorcode[error]}", late=late)
    place.command(place.out)
    assert listing(place.folder) == place.files


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_neither_file_nor_folder_stays(commands, tmp_path, monkeypatch, name, kind):
    """Renamed to /dev/null, an output would take the device's place."""
    called, command = commands[name]
    out = tmp_path / called
    with socket.socket(socket.AF_UNIX) as made:
        if kind == "pipe":
            os.mkfifo(out)
        else:
            monkeypatch.chdir(tmp_path)  # the name of a socket is short
            made.bind(called)
        code, said = spoken(lambda: command(out))
    assert code == 2 and f"--output {out} is a device, a pipe or a socket" in said[0]
    assert list(tmp_path.iterdir()) == [out] and not (out.is_file() or out.is_dir())
    count("machine", "refused")
