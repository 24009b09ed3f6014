"""The standard streams of a command: closed, full, in an encoding that does not know a character, or read by nobody."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import IO, Any

STANDARD = {"stdin": "r", "stdout": "w", "stderr": "w"}
WIDEST = 500
"""Columns of what is shown; rich fills lines with blanks up to what COLUMNS says."""


class StdoutRefused(OSError):
    """Stdout takes no more: a full disk behind it. Of an error of the system nobody else would know that."""


class _Stdout(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise  # for the guard to judge
        except OSError as error:
            raise StdoutRefused(error.errno, error.strerror, "stdout") from error


class _Stderr(io.FileIO):
    """What cannot be told stops no work."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def settle() -> None:
    """Before anything is read or shown: make the streams such that a command can use them, and lines no longer than
    somebody would read."""
    for name, mode in STANDARD.items():
        if getattr(sys, name) is None:  # as after `>&-`
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)  # it has the closed one's number, which children look for too
            setattr(sys, name, open(nowhere, mode, closefd=False))  # noqa: SIM115 - as long as the process lives
    for name, kind in (("stdout", _Stdout), ("stderr", _Stderr)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):  # Python's own
            told = io.BufferedWriter(kind(stream.fileno(), "w", closefd=False))
            at_once = stream.line_buffering or stream.write_through  # the latter with PYTHONUNBUFFERED
            again = io.TextIOWrapper(told, stream.encoding, "backslashreplace", line_buffering=at_once)
            setattr(sys, name, again)
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and (len(columns) > len(str(WIDEST)) or int(columns) > WIDEST):
        os.environ["COLUMNS"] = str(WIDEST)


def holds_every_character(stream: IO[str]) -> bool:
    """Whether its encoding does."""
    return codecs.lookup(stream.encoding or "utf-8").name.startswith("utf")


def nobody_reads() -> bool:
    """Whether the reader of stdout went away, as in `grail methods | head -1`. That is written to when all work is
    done, so that it is no failure."""
    try:
        watched = select.poll()
        watched.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in watched.poll(0))
    except (OSError, ValueError):
        return False


def silence_stdout() -> None:
    """What still waits to be written to it goes nowhere, or Python would complain as it ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
