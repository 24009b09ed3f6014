"""The journal of a run: one line of JSON for each committed step, on disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

START = "start"


class Journal:
    """The committed steps, oldest first. A last line that was cut off is not a step: it is taken away when the next one
    is written."""

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
        """Whether there is work to go on with: anything beyond the line that says what was asked."""
        return any(step["step"] != START for step in self.steps)

    def find(self, kind: str) -> list[dict]:
        """The steps of one kind."""
        return [step for step in self.steps if step["step"] == kind]

    def append(self, step: dict) -> None:
        """Commit one step."""
        line = (json.dumps(step, sort_keys=True) + "\n").encode()
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._sound)
            file.seek(self._sound)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
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
    try:
        step = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return step if isinstance(step, dict) and isinstance(step.get("step"), str) else None
