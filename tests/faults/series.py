"""Many cases of one kind: all are tried, and those that were misjudged are told together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.judge import Ending, Misjudged, judge
from tests.faults.tally import times

SHOWN = 12


class Series:
    """As a context manager around the cases of a kind; in `home` each has a folder of its own."""

    def __init__(self, kind: str, home: Path, sound: Path | None = None):
        self.kind, self.home, self.sound = kind, home, sound
        self.wrong: list[str] = []
        self.tried = 0

    def __enter__(self) -> Series:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self.wrong:
            told = f"{len(self.wrong)} of {self.tried} cases\n" + "\n".join(self.wrong[:SHOWN])
            raise Misjudged(told.encode(errors="backslashreplace").decode())  # half characters cannot be sent on

    def seeds(self, number: int) -> Iterator[Random]:
        """A source of random choices for each of so many cases, multiplied by GRAIL_FAULTS."""
        for seed in range(times(number)):
            yield Random(f"{self.kind} {self.home.name} {seed}")

    def folder(self) -> Path:
        """A fresh folder for the next case, holding a copy of what is sound."""
        case = self.home / "case"
        shutil.rmtree(case, ignore_errors=True)
        if self.sound is None:
            case.mkdir(parents=True)
        else:
            shutil.copytree(self.sound, case)
        return case

    def case(self, how: str, run: Callable[[], Any], folder: Path, **allowed: Any) -> Ending | None:
        """Judge one; None where it was misjudged."""
        self.tried += 1
        try:
            return judge(self.kind, run, folder, **allowed)
        except Misjudged as difference:
            self.wrong.append(f"{how}: {difference}"[:600])
            return None
