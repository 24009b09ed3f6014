"""Exceptions that are no bugs: bad input, and an interruption that can be gone on from."""

from __future__ import annotations

import errno

CIRCUMSTANCES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENAMETOOLONG}
"""Errors of the system that the user can mend."""


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
    return f"{error.filename or 'input/output'}: {error.strerror or error}"


def verdict(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit code of what a command may end with; None for a bug."""
    if isinstance(error, GrailError):
        return str(error), 2
    if isinstance(error, Interrupted):
        return str(error), 75
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing new was kept", 130
    if isinstance(error, OSError) and error.errno in CIRCUMSTANCES:
        return sentence_of(error), 2
    return None
