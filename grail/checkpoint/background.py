"""Read the next layer and write the last one while the current one is computed.

Steps are committed in order and by the main thread alone, so that neither their order nor any sum depends on timing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..distributed import Group
from ..profile import Profile
from .pieces import Piece
from .reader import SafetensorsFolder
from .writer import OutputFolder

THREADS = 2
ROOM = 2**25
"""Bytes of address space that a thread wants, with something to spare."""


@dataclass
class _Pending:
    file: str
    pieces: list[Piece]
    said: dict
    written: Future


class Background:
    """A context manager. With enabled=False everything happens at once, in the main thread.

    When the block is left by an error, what was being written is still waited for and, where there is one process,
    committed: it is whole. Of several, others may not have done their part of it.
    """

    def __init__(self, out: OutputFolder, group: Group, profile: Profile, *, enabled: bool = True):
        self.out, self.group, self.profile, self.enabled = out, group, profile, enabled
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="grail-background")
        self._pending: _Pending | None = None
        self._then: Callable[[], None] | None = None

    def __enter__(self) -> Background:
        """Start the threads while there is room for them: starting one that finds no memory never returns."""
        with mmap.mmap(-1, THREADS * ROOM):
            pass
        started = threading.Barrier(THREADS + 1)
        for _ in range(THREADS):
            self._pool.submit(started.wait)
        started.wait()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None and self.group.size == 1:
            with contextlib.suppress(Exception):
                self._commit()
        self._pool.shutdown(cancel_futures=True)

    def read_ahead(self, source: SafetensorsFolder, names: list[str]) -> None:
        """Have the system read these tensors into its cache; no memory of this process is used."""
        if self.enabled and hasattr(os, "posix_fadvise"):
            self._pool.submit(_advise, source, names)

    def write(self, file: str, pieces: list[Piece] | None, then: Callable[[], None], **said: object) -> None:
        """Begin to write a shard (None: another process does), to be committed by `settle`, which calls `then`."""
        self.settle()
        self._then = then
        if pieces is not None:
            self._pending = _Pending(file, pieces, said, self._pool.submit(self._write, file, pieces))
        if not self.enabled:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written, and commit it once every process has done its part. All processes call it at
        the same point."""
        then, self._then = self._then, None
        if then is None:
            return
        with self.profile.phase("wait for the writer"):
            self.group.barrier()
            self._commit()
            self.group.barrier()
        then()

    def _commit(self) -> None:
        pending = self._pending
        if pending is not None:
            checksum = pending.written.result()
            self._pending = None  # only now: an interruption while waiting must not lose it
            self.out.commit_shard(pending.file, pending.pieces, checksum, **pending.said)

    def _write(self, file: str, pieces: list[Piece]) -> int:
        with self.profile.phase("write", bytes=sum(piece.nbytes for piece in pieces)):
            return self.out.write_file(file, pieces)


def _advise(source: SafetensorsFolder, names: list[str]) -> None:
    for name in names:
        info = source.info(name)
        with contextlib.suppress(OSError), open(info.file, "rb") as file:
            os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
