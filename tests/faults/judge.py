"""What a case may do: end in one clear sentence, or in a result; in time, within memory, writing only where it may,
and running nothing that came with the input.

Python's audit events tell what it opens, runs and starts. What they do not see (libraries that write by themselves) is
found by comparing the case's folder before and after.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grail.errors import verdict
from tests.faults.tally import count

SECONDS = 60.0
MEMORY = 600 * 2**20
"""Bytes of address space beyond what the process has: torch and transformers map a few hundred MB in a small run."""
CANARY = "grail_canary"
"""A word in hostile strings that no code of ours has: what compiles it was told to by the input."""
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn"}
CHANGES = {
    "os.rename": ((0, 2), (1, 3)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),), "os.rmdir": ((0, 1),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),),
}  # fmt: skip
"""Events that change what lies on a disk: where among their arguments a path is, and the folder it is relative to."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TORCHS_OWN = "torchinductor_"
"""A folder that torch makes in the one for temporary files when some of its parts are imported."""
DEVICES = ("/dev/null", "/dev/tty")


class Misjudged(AssertionError):
    """What a case did and may not."""


class _Hang(BaseException):
    """Not to be caught by `except Exception`."""


@dataclass
class Ending:
    """How a case ended: the sentence it was refused with, or None and its value."""

    refused: str | None
    value: Any = None


@dataclass
class _Watch:
    """What audit events tell while a case runs."""

    inputs: Path
    may_write: tuple[Path, ...]
    may_start: bool
    found: list[str] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def see(self, event: str, args: tuple) -> None:
        if event == "open":
            self._opened(*args)
        elif event in CHANGES:
            for path, folder in CHANGES[event]:
                self._written(event, args[path], -1 if folder is None else args[folder])
        elif event in STARTS and not self.may_start:
            self.found.append(f"{event} of {args[0] if args else ''}")
        elif event == "exec" and self._is_input(args[0].co_filename):
            self.found.append(f"code of {args[0].co_filename} was run")
        elif event == "compile":
            self._compiled(*args)
        elif event == "import" and args[1] and self._is_input(args[1]):
            self.found.append(f"{args[1]} was imported")
        elif event == "pickle.find_class":
            self.found.append(f"a pickle named {args[0]}.{args[1]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.found.append(f"{event} {args[-1] if event == 'socket.connect' else args[0]}")
        elif event == "ctypes.dlopen" and args[0] and self._is_input(args[0]):
            self.found.append(f"the library {args[0]} was opened")

    def _compiled(self, source: object, filename: object) -> None:
        text = source.encode() if isinstance(source, str) else source
        if (isinstance(text, bytes) and CANARY.encode() in text) or self._is_input(filename):
            self.found.append(f"{filename}: text of the input was compiled")

    def _opened(self, path: object, mode: object, flags: object) -> None:
        if isinstance(path, int) or not isinstance(flags, int) or not flags & WRITING:
            return
        self._written("open", path)

    def _written(self, event: str, path: Any, folder: int = -1) -> None:
        if isinstance(path, int):
            return
        above = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        place = Path(os.path.normpath(os.path.join(above, os.fsdecode(path))))
        if str(place) not in DEVICES and not any(place.is_relative_to(root) for root in self.may_write):
            self.found.append(f"{event} of {place}, outside of the output")

    def _is_input(self, path: object) -> bool:
        return isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(str(self.inputs))


_watch: _Watch | None = None


def _hook(event: str, args: tuple) -> None:
    if _watch is not None and _watch.thread == threading.get_ident():
        try:
            _watch.see(event, args)
        except Exception as error:
            _watch.found.append(f"{event} {args!r} is not understood: {error!r}")


platform.platform()  # which a report says: the first time it starts a process
sys.addaudithook(_hook)


def judge(
    kind: str,
    run: Callable[[], Any],
    folder: Path,
    *,
    names: Collection[str | Path],
    output: Path | None = None,
    may_write: Collection[Path] = (),
    may_start: bool = False,
    keeps: bool = False,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Ending:
    """Run one case of a kind; how it ended. Raises Misjudged for anything that it may not do.

    folder: with everything of the case in it, input and output; names: of which a refusal has to hold one; output: the
    folder that may be written (and its .partial); may_write: more of them; keeps: a refusal need not leave the output
    as it was (--resume goes on with what is there).
    """
    roots = [*may_write, *((output, output.with_name(output.name + ".partial")) if output else ())]
    before = listing(folder)
    with tempfile.TemporaryDirectory(prefix="grail-judged-") as scratch:
        watch = _Watch(folder, tuple(Path(os.path.realpath(root)) for root in (*roots, scratch)), may_start)
        try:
            ending = _run(run, watch, scratch, seconds, memory)
        except Misjudged as difference:
            raise Misjudged(f"{kind}: {difference}") from difference
        left = sorted(path.name for path in Path(scratch).iterdir() if not path.name.startswith(TORCHS_OWN))
    said = list(watch.found)
    if left:
        said.append(f"{left[0]} was left behind in the folder for temporary files")
    changed = set(listing(folder).items() ^ before.items())
    places = {Path(os.path.realpath(folder)) / name for name, _ in changed}
    allowed = () if ending.refused is not None and not keeps else watch.may_write
    said += [f"{p} was changed" for p in sorted(places) if not any(p.is_relative_to(root) for root in allowed)]
    if ending.refused is not None:
        said += _complaints(ending.refused, names)
    if said:
        raise Misjudged(f"{kind}: {'; '.join(said[:5])} (it ended with {ending.refused or 'a result'})")
    count(kind, "accepted and right" if ending.refused is None else "refused")
    return ending


def _run(run: Callable[[], Any], watch: _Watch, scratch: str, seconds: float, memory: int) -> Ending:
    global _watch
    with _limited(memory), _timed(seconds), _temporary(scratch):
        _watch = watch
        try:
            return Ending(None, run())
        except _Hang:
            raise Misjudged(f"still at work after {seconds:g} s") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _watch = None
            for cause in _chain(error):
                if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                    raise Misjudged(f"asked for more memory than there is to give: {cause!r}") from error
            told = verdict(error)  # what a command would say
            if told is None:
                raise Misjudged(f"raised {type(error).__name__}: {error}") from error
            return Ending(told[0])
        finally:
            _watch = None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _complaints(sentence: str, names: Collection[str | Path]) -> list[str]:
    said = []
    if not sentence.strip() or len(sentence.splitlines()) != 1:
        said.append("the sentence is not one line")
    if not any(str(name) in sentence for name in names):
        said.append("the sentence names neither the file nor its folder, option or field")
    return said


def blames_what_was_asked(sentence: str, asked: dict[str, Any]) -> bool:
    """Whether the first option that a refusal names is one that the run was given beside --method and --ratio."""
    named = re.search(r"--([a-z][a-z-]*)", sentence)
    return named is not None and named[1].replace("-", "_") in asked.keys() - {"method", "ratio"}


@contextmanager
def _limited(memory: int) -> Iterator[None]:
    """A soft limit on address space: what it has, and so much more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    """An alarm; and where no Python runs that could hear it, the end of the process with a trace."""

    def ring(*args: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should it be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _temporary(scratch: str) -> Iterator[None]:
    """Temporary files go where the judge looks, and imports leave no bytecode."""
    before, tempfile.tempdir = tempfile.tempdir, scratch
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        tempfile.tempdir, sys.dont_write_bytecode = before, bytecode


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder, by relative name: contents, links, folders."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found
