"""Progress for people: the silent base here, the terminal one in the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

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
