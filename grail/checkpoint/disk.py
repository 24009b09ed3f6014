"""What a working folder needs of the disk: a lock that ends with its process, second names, and to be taken away."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO

from ..errors import GrailError, naming

REMOVALS = 10


def check_own(path: Path) -> None:
    """Raises GrailError where a working file of a run is to lie and there is something else: a pipe is waited for."""
    if path.exists() and not path.is_file():
        raise GrailError(f"{path} is in the way and is no file of grail's; move {path.parent} or choose another output")


def locked(path: Path) -> IO | None:
    """The lock file, locked until it is closed; None where another run has it, or took it away at this moment."""
    check_own(path)
    file = open(path, "a")  # noqa: SIM115 - held until the run ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    except OSError:
        pass
    file.close()
    return None


def link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with naming(target):
            shutil.copyfile(source, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())


def stamp(file: Path) -> tuple[int, int]:
    """Size and time, by which a change shows."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def remove(folder: Path) -> None:
    """Remove a working folder, while another process of a run that failed may still put a last chunk there."""
    for _ in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)
