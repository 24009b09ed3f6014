"""A file that is whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import GrailError, naming

LOADED = (".safetensors", ".bin", ".json")
"""What libraries look for in a checkpoint's folder, whether or not it has such a file so far."""
NO_FILE = "is a device, a pipe or a socket, which would be replaced; choose another"


def is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder: a rename would put one in its place."""
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def replacing(file: Path, suffix: str = "") -> Iterator[Path]:
    """A name beside `file`, ending in `suffix`, whose content takes the file's place when the block ends. Folders that
    are missing are made. After an error or an interruption all is as it was. Raises GrailError for a device.
    """
    if is_special(file):
        raise GrailError(f"--output {file} {NO_FILE}")
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise GrailError(f"{file} cannot be written: {error.filename} is no folder") from error
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial{suffix}")
    try:
        with naming(file, nameless=True):
            yield temporary
            os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):  # what stopped this may stop that too
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # of another one, who put something there
            for folder in made:
                folder.rmdir()
        raise


def refuse_part_of(folder: Path, file: Path, suffix: str) -> None:
    """Raises GrailError where a file that is to be replaced is one of the checkpoint that is exported; one with the
    export's own suffix is an earlier export. So would one be that is called as a file of it could be."""
    if file.suffix == suffix or not file.resolve().is_relative_to(folder.resolve()):
        return
    if file.exists():
        raise GrailError(f"--output {file} is a file of the checkpoint itself; choose another name")
    if file.suffix in LOADED:
        raise GrailError(f"--output {file} would be taken for a file of the checkpoint; choose another name")
