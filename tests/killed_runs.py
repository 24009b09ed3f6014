"""Kill compressions at any point, go on with them, and compare what comes out with an undisturbed run, byte for byte.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.killed_runs --method flap --trials 60 --timed 10 --seed 1

Without --trials every event of every method is tried, before it and half-way through it. Every run is a forked child:
one import of torch serves them all.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import grail.pipeline
import grail.plan
import grail.workspace
from grail import store
from grail.checkpoint import journal, reopen, writer
from tests.tiny import tiny_calibration, tiny_checkpoint

CHUNK_TOKENS = 32
WINDOWS = {"windows": 6, "length": 16}
METHODS: dict[str, dict[str, Any]] = {
    "wanda-sp": {"compare_pruned": True, "eval": "held_out"},
    "flap": {"store": "disk"},
    "fold": {"eval": "held_out", "store": "disk"},
    "wanda-pp-sp": {"set": {"passes": "1", "windows": "4", "learning_rate": "1e-3"}},
    "slimgpt": {"store": "disk", "overwrite": True},
    "search": {"method": "wanda-sp", "alpha": "search", "eval": "held_out"},
}
MORE_WINDOWS = {"search": 12}
"""With six no window can be spared to choose by."""
Kill = tuple[int, bool] | float
"""An event's number and whether half of it is done; or a share of the time that an undisturbed run takes."""


class Difference(Exception):
    """A run that was gone on with ended in something else than an undisturbed one."""


class Events:
    """What runs do to their files, counted. At number `fatal` (with `lasting`, from there on) `end` is called in place
    of the event or, when `torn`, after half of it. only: the kinds that count, all by default."""

    def __init__(
        self, fatal: int | None, torn: bool, end: Callable[[], None], *, lasting: bool = False, only: tuple = ("",)
    ):
        self.fatal, self.torn, self.end, self.lasting, self.only = fatal, torn, end, lasting, only
        self.seen: list[str] = []
        self._lock = threading.RLock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is done within, in all threads."""
        with ExitStack() as stack:
            for module in (journal, store, writer):
                stack.enter_context(mock.patch.object(module, "open", self._open, create=True))
            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir", "link"):
                stack.enter_context(mock.patch.object(os, name, self._whole(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(shutil, "copyfile", self._copyfile))
            yield

    def strike(self, kind: str, half: Callable[[], object]) -> None:
        if not kind.startswith(self.only):
            return
        with self._lock:
            number = len(self.seen)
            self.seen.append(kind)
            if number == self.fatal or (self.lasting and number > self.fatal):
                if self.torn:
                    half()
                self.end()

    def _open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        file = open(path, mode, **options)  # noqa: SIM115 - the caller closes it
        return _Watched(file, self) if set(mode) & set("wa+") else file

    def _whole(self, name: str, call: Callable) -> Callable:
        """An operation that has no half: torn means that it is done, and nothing after it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            def whole() -> None:
                with suppress(OSError):
                    call(*args, **kwargs)

            if name != "mkdir" or not Path(args[0]).is_dir():
                self.strike(name, whole)
            return call(*args, **kwargs)

        return watched

    def _copyfile(self, source: Any, target: Any) -> None:
        content = Path(source).read_bytes()
        self.strike("write copy", lambda: Path(target).write_bytes(content[: len(content) // 2]))
        Path(target).write_bytes(content)


class _Watched:
    """A file whose writes are events."""

    def __init__(self, file: Any, events: Events):
        self._file, self._events = file, events
        path = Path(file.name)
        self._what = "chunk" if "store" in path.parts else path.name.partition(".")[2] or path.name

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._events.strike(f"write {self._what}", half)
        return self._file.write(data)

    def truncate(self, size: int) -> int:
        self._events.strike("truncate", lambda: self._file.truncate(size))
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def small_runs() -> Iterator[None]:
    """Small chunks, and no time spent on measuring the machine."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(grail.workspace, "CHUNK_TOKENS", CHUNK_TOKENS))
        for name in ("gemm_rate", "disk_rate"):
            stack.enter_context(mock.patch.object(grail.plan, name, lambda *args: 1e9))
        yield


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a finished output but those that hold times."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if name not in ("run.json", "report.html", "README.md")}


def committed_layers(partial: Path) -> int:
    """How many layers need not be computed again: none when the run was cut off as it took its working files away."""
    steps = journal.Journal(partial / writer.JOURNAL)
    return 0 if steps.find("finished") else sum("layer" in step for step in steps.find(writer.SHARD))


class Case:
    """One method on a tiny model of three layers, all in one folder; `flags` are those of grail.compress."""

    def __init__(self, method: str, work: Path):
        self.work, self.tried = work, Counter()
        work.mkdir(exist_ok=True)
        self.source = tiny_checkpoint(work / "source", num_hidden_layers=3, shard="20KB")
        for name in ("LICENSE", "NOTICE", "generation_config.json"):
            (self.source / name).write_text('{"max_length": 8}')
        self.flags = {"method": method, **METHODS[method]}
        text = WINDOWS | {"windows": MORE_WINDOWS.get(method, WINDOWS["windows"])}
        self.flags["calibration"] = str(tiny_calibration(work / "calibration.safetensors", **text))
        if "eval" in self.flags:
            self.flags["eval"] = str(tiny_calibration(work / "held_out.safetensors", **WINDOWS))

    def compress(self, output: Path, **flags: Any) -> dict:
        """One run in this process, without the reopening check. "first": the layer that it began with; "probe": a hash
        of the logits that the check would have compared."""
        found: dict[str, Any] = {}

        def verify(folder, probe_1L, logits_1LV, *args, **kwargs):
            found["probe"] = zlib.crc32(logits_1LV.numpy().tobytes())
            return {}

        def recalled(*args):
            first = whence(*args)
            found.setdefault("first", first)
            return first

        whence = grail.pipeline._recalled
        with mock.patch.object(reopen, "verify", verify), mock.patch.object(grail.pipeline, "_recalled", recalled):
            grail.compress(self.source, output=output, **(self.flags | flags))
        return found

    def start(self, output: Path, kill: Kill | None = None, **flags: Any) -> int:
        """Begin a run in a fork, killed at its event; returns the process id."""
        process = os.fork()
        if process:
            return process
        try:
            events = Events(*(kill if isinstance(kill, tuple) else (None, False)), kill_self)
            with events.watching():
                found = self.compress(output, **flags)
            (self.work / "found.json").write_text(json.dumps(found | {"events": events.seen}))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def ended(self, process: int) -> dict | None:
        """What a run found; None when it was killed. Raises Difference for an error."""
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status not in (0, -signal.SIGKILL):
            raise Difference(f"a run failed with exit code {status}, its traceback is on stderr")
        return None if status else json.loads((self.work / "found.json").read_text())

    def reference(self) -> None:
        """An undisturbed run."""
        begun = time.monotonic()
        out = self.work / "reference" / "deep" / "out"
        found = self.ended(self.start(out))
        self.seconds = time.monotonic() - begun
        self.events, self.probe = found["events"], found["probe"]
        self.files = files_of(out)

    def trial(self, kills: list[Kill]) -> None:
        """Kill a run, then each that goes on with it; then go on to the end. Raises Difference."""
        home = Path(tempfile.mkdtemp(dir=self.work))
        out = home / "deep" / "out"
        if self.flags.get("overwrite"):
            out.mkdir(parents=True)
            (out / "config.json").write_text("old")
        try:
            for number, kill in enumerate([*kills, None]):
                if self._run(out, kill, resume=number > 0):
                    break
            self._compare(out)
        except Difference as difference:
            raise Difference(f"killed at {', then '.join(map(self._name, kills))}: {difference}") from difference
        shutil.rmtree(home)
        self.tried["trials"] += 1

    def _run(self, out: Path, kill: Kill | None, resume: bool) -> bool:
        """One run; whether the output is whole."""
        partial = out.with_name("out.partial")
        before = committed_layers(partial)
        process = self.start(out, kill, resume=resume)
        if isinstance(kill, float):
            time.sleep(kill * self.seconds)
            os.kill(process, signal.SIGKILL)
        found = self.ended(process)
        if found is None:
            self.tried["kills"] += 1
            return (out / "grail.json").exists() and not partial.exists() and not (out / writer.JOURNAL).exists()
        if found["probe"] != self.probe:
            raise Difference("the reopening check is given other logits")
        if found["first"] < before:
            raise Difference(f"{before} layers were committed, and the run that went on began at {found['first']}")
        self.tried["gone on with"] += before > 0
        return True

    def _compare(self, out: Path) -> None:
        found = files_of(out) if out.is_dir() else {}
        for name in sorted(found | self.files):
            if name not in found or name not in self.files:
                raise Difference(f"{name} is {'missing' if name in self.files else 'a stray file'}")
            if found[name] != self.files[name]:
                raise Difference(f"{name} differs")
        if stray := {file.name for file in out.parent.iterdir()} - {"out"}:
            raise Difference(f"{sorted(stray)[0]} was left behind")

    def _name(self, kill: Kill) -> str:
        if isinstance(kill, float):
            return f"{kill:.0%} of the time"
        return f"{'half of' if kill[1] else 'before'} event {kill[0]} ({self.events[kill[0]]})"


def plans(case: Case, trials: int | None, timed: int, chance: random.Random) -> Iterator[list[Kill]]:
    """What to kill: every event (or `trials` of them, all kinds alike), each third run several times; then runs at
    random times."""
    points: dict[str, list[Kill]] = {}
    for number, kind in enumerate(case.events):
        points.setdefault(kind, []).extend([(number, False), (number, True)])
    for found in points.values():
        chance.shuffle(found)
    kinds = chance.sample(list(points.values()), len(points))
    mixed = [point for each in zip_longest(*kinds) for point in each if point is not None]
    for point in mixed[:trials]:
        plan = [point]
        while chance.random() < 1 / 3:
            plan.append((chance.randrange(len(case.events)), chance.random() < 0.5))
        yield plan
    for _ in range(timed):
        yield [chance.random()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", action="append", choices=METHODS, help="all of them by default")
    parser.add_argument("--trials", type=int, help="of each method; by default every event, before and half-way")
    parser.add_argument("--timed", type=int, default=10, help="kills at random times, of each method")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    said: dict[str, Any] = {"seed": asked.seed, "methods": {}}
    with tempfile.TemporaryDirectory(prefix="grail-killed-") as work, small_runs():
        Case("fold", Path(work)).compress(Path(work) / "warm")  # imports what all children would have to
        for method in asked.method or METHODS:
            case = Case(method, Path(work) / method)
            said["methods"][method] = case.tried
            try:
                case.reference()
                for plan in plans(case, asked.trials, asked.timed, random.Random(f"{asked.seed} {method}")):
                    case.trial(plan)
            except Difference as difference:
                said["difference"] = f"{method}, {difference}"
                break
            case.tried["events"] = len(case.events)
    sys.stdout.write(json.dumps(said) + "\n")
    sys.exit("difference" in said)


if __name__ == "__main__":
    main()
