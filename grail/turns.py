"""Of the threads that call public functions one has its turn, the others wait for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds after which a thread says what it waits for: for good, if that one waits for it in turn."""


class _Turn:
    """A lock that a thread may take again, and the name of the thread that has it."""

    def __init__(self) -> None:
        self.lock, self.holder = threading.RLock(), ""


_turn = _Turn()


@contextmanager
def in_turn() -> Iterator[None]:
    """One thread at a time; within one it nests."""
    turn, name = _turn, threading.current_thread().name
    if not turn.lock.acquire(timeout=PATIENCE):
        log.warning(
            "the thread %s waits for a call of grail in the thread %s to end; if that one waits for this one, as for a "
            "data loader whose own thread calls grail, neither goes on",
            name,
            turn.holder,
        )
        turn.lock.acquire()
    before, turn.holder = turn.holder, name
    try:
        yield
    finally:
        turn.holder = before
        turn.lock.release()


def _begin_anew() -> None:
    """A forked child has only the thread that forked: the one whose turn it was would never end it there."""
    global _turn
    _turn = _Turn()


os.register_at_fork(after_in_child=_begin_anew)
