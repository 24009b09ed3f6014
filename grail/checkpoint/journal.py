"""The journal of a run: one line of JSON for each committed step, on disk before the next one begins.

A line begins with the CRC-32 of the step's own JSON as "sum".
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

START = "start"


class Journal:
    """The committed steps, oldest first. A line that was cut off or damaged is not a step, nor is what follows it: it
    is taken away when the next one is written."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: list[dict] = []
        self._sound = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            step = _parsed(line)
            if step is None:
                break
            self.steps.append(step)
            self._sound += len(line)

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
        try:
            with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                file.truncate(self._sound)
                file.seek(self._sound)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._sound += len(line)
        self.steps.append(step)

    def rewind(self, keep: Callable[[dict], bool]) -> None:
        """Take back the steps that `keep` does not hold for."""
        left = [step for step in self.steps if keep(step)]
        temporary = self.path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        anew = Journal(temporary)
        for step in left:
            anew.append(step)
        if left:
            os.replace(temporary, self.path)
        else:
            self.path.unlink(missing_ok=True)
        self.steps, self._sound = anew.steps, anew._sound


def _parsed(line: bytes) -> dict | None:
    match = re.fullmatch(rb'\{"sum": (\d+), (.*)\n', line)
    if match is None or zlib.crc32(text := b"{" + match[2]) != int(match[1]):
        return None
    return json.loads(text)
