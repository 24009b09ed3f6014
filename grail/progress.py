"""Progress for people and for callbacks: the silent base here, the terminal one in the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger("grail")


class Progress:
    """Says little: warnings go to logging. Subclasses show bars and lines."""

    def say(self, line: str) -> None:
        """One line about what is going to happen."""
        log.info("%s", line)

    def warn(self, line: str) -> None:
        """Something the user should know but that does not stop the run."""
        log.warning("%s", line)

    def layers(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        """Wraps the loop over layers."""
        return lambda layers: layers

    def site(self, entry: dict[str, Any]) -> None:
        """A site is done; its entry of `report.sites`. Once for each site of the result, in execution order, of several
        processes in the main one alone. A run that goes on with the work of another begins with the sites that it
        takes from there."""


class BarsOnly(Progress):
    """Passes on to another progress what is shown of loops, and nothing of what is said: another run has said it."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def say(self, line: str) -> None:
        """Nothing."""

    def warn(self, line: str) -> None:
        """Nothing."""

    def layers(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        return self.progress.layers(label)


class Telling(Progress):
    """Passes on all to another progress, and the sites to a function as well."""

    def __init__(self, progress: Progress, on_site: Callable[[dict[str, Any]], object]):
        self.progress, self.on_site = progress, on_site

    def say(self, line: str) -> None:
        self.progress.say(line)

    def warn(self, line: str) -> None:
        self.progress.warn(line)

    def layers(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        return self.progress.layers(label)

    def site(self, entry: dict[str, Any]) -> None:
        self.progress.site(entry)
        self.on_site(entry)
