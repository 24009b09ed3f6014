"""The journal of a run: one line of JSON for each committed step, on disk before the next one begins.

A line begins with the CRC-32 of the step's own JSON as "sum".
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from ..errors import Circumstance, GrailError, naming
from .disk import check_own

JOURNAL, START = "journal.jsonl", "start"


class Journal:
    """The committed steps, oldest first. A line that was cut off or damaged is not a step, nor is what follows it: it
    is taken away when the next one is written."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: list[dict] = []
        self._ends = [0]
        check_own(path)
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            step = _parsed(line)
            if step is None:
                break
            self.steps.append(step)
            self._ends.append(self._ends[-1] + len(line))

    @property
    def committed(self) -> bool:
        """Whether there is work to go on with: a line that says what was asked, and anything beyond."""
        return bool(self.find(START)) and any(step["step"] != START for step in self.steps)

    def find(self, kind: str) -> list[dict]:
        """The steps of one kind."""
        return [step for step in self.steps if step["step"] == kind]

    def append(self, step: dict) -> None:
        """Commit one step."""
        text = json.dumps(step, sort_keys=True).encode()
        line = b'{"sum": %d, %b\n' % (zlib.crc32(text), text[1:])
        self._write(line)
        self._ends.append(self._ends[-1] + len(line))
        self.steps.append(step)

    def rewind(self, keep: Callable[[dict], bool]) -> None:
        """Take back the first step that `keep` does not hold for, and all that followed from it."""
        left = list(takewhile(keep, self.steps))
        self.steps, self._ends = left, self._ends[: len(left) + 1]
        if self.path.exists():
            self._write(b"")

    def _write(self, line: bytes) -> None:
        """Put a line in place of all that follows the last step."""
        with naming(self.path), open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._ends[-1])
            file.seek(self._ends[-1])
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around what is made of committed steps. Raises Circumstance, which leaves the work as it is, where a line whose
    checksum is right says what no run says."""
    try:
        yield
    except GrailError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise Circumstance(
            f"--resume: {path} says what no run of grail says ({type(error).__name__}: {error}); to start over, give "
            f"--overwrite and not --resume"
        ) from error


def _parsed(line: bytes) -> dict | None:
    match = re.fullmatch(rb'\{"sum": (\d+), (.*)\n', line)
    if match is None or zlib.crc32(text := b"{" + match[2]) != int(match[1]):
        return None
    try:
        step = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(step, dict) and isinstance(step.get("step"), str) and isinstance(step.get("file", ""), str)
    return step if sound else None
