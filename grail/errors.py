"""Exceptions that are no bugs: bad input, what the machine refuses, and an interruption that can be gone on from."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CIRCUMSTANCES = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG,
    errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN,
    errno.ETIMEDOUT, errno.ENOMEM, errno.EBUSY, errno.EXDEV,
    errno.ENOTEMPTY, errno.EEXIST,
}  # fmt: skip
"""Errors of the system that the user can mend: a full or broken disk, a folder that vanished."""
FROM_RUST = re.compile(r"\(os error (\d+)\)")
"""How errors of the system end in the text of safetensors and tokenizers, which have exceptions of their own."""
CUT_OFF = re.compile(r"\d+ requested and \d+ written")
"""What numpy says where the system would not write all of an array, and does not say why."""
NO_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc", "MemoryError", "Cannot allocate memory")
"""In the text of errors of torch, and of processes that were started, where there is no memory left."""
UNMAPPED = "failed to map segment"
"""In that of a library that finds no room when it is loaded; or lies on a disk of which nothing may be run."""
NOWHERE = "the current folder is gone: change to another one"

INTERRUPTED = "interrupted; nothing new was kept", 130
"""Sentence and exit code."""
LONGEST = 2000
"""Characters of a sentence; what a file says may be quoted in it."""


class GrailError(ValueError):
    """Bad input. The message is one sentence that names the file, site or option and says what to do; one line,
    whatever stands in a file's name or is quoted from it."""

    def __init__(self, sentence: str):
        shown = (c if c.isprintable() else " " if c.isspace() else "?" for c in " ".join(str(sentence).splitlines()))
        line = "".join(shown)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class Circumstance(GrailError):
    """What stopped the run is not its input: a full disk, another process that died. Work that was done is kept."""


class Lost(Circumstance):
    """Another process of the run ended. The message says how to go on."""


class Interrupted(Exception):
    """Stopped on request with work kept; the message says how to go on."""


def first_line(error: BaseException) -> str:
    """Of what another library says, the first line; the exception's name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def sentence_of(error: OSError) -> str:
    """What the system says, with the file it is about."""
    if error.filename is None and error.errno == errno.ENOENT and is_nowhere():
        return NOWHERE
    return f"{error.filename or 'input/output'}: {error.strerror or error}"


def is_nowhere() -> bool:
    """Whether this process is in a folder that was taken away, so that names that begin there mean nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


@contextmanager
def naming(file: Path | str, *, nameless: bool = False) -> Iterator[None]:
    """Errors of the system within say which file they are about: those of a write do not by themselves. nameless: only
    these."""
    try:
        yield
    except OSError as error:
        if error.errno is None and CUT_OFF.search(str(error)):
            raise Circumstance(f"{file}: {error}; the disk is full, or takes no file of that length") from error
        if error.errno is None or (nameless and error.filename is not None):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def circumstance(error: BaseException) -> str | None:
    """The sentence of what the machine refused, whichever library found out; None for anything else."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _no_memory(error)
    if isinstance(error, OSError) and error.errno is not None:
        return sentence_of(error) if error.errno in CIRCUMSTANCES else None
    if isinstance(error, GrailError):
        return None
    found = FROM_RUST.search(str(error))
    if found and int(found[1]) in CIRCUMSTANCES:
        return first_line(error) if int(found[1]) != errno.ENOMEM else _no_memory(error)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY):
        return _no_memory(error)
    if isinstance(error, (ImportError, OSError)) and UNMAPPED in str(error) and _bounded():
        return _no_memory(error)
    return None


def _bounded() -> bool:
    """Whether this process may have so much memory only (ulimit -v)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _no_memory(error: BaseException) -> str:
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    more = f" ({wanted[1]} more were asked for)" if wanted else ""
    return f"out of memory{more}: take less at once with --memory, --store disk or --batch, or give the process more"


def verdict(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit code of what a command may end with; None for a bug."""
    if isinstance(error, GrailError):
        return str(error), 2
    if isinstance(error, Interrupted):
        return str(error), 75
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    told = circumstance(error)
    return None if told is None else (told, 2)
