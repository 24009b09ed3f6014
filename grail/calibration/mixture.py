"""Several texts as one: `a+b` stands for as many windows of each."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import GrailError

SEPARATOR = "+"
TOKENISED = ".safetensors"
"""How the name of a file of token ids ends."""


def parts_of(source: str) -> list[str]:
    """The texts that a name stands for; an existing file of that name is one. Raises GrailError for an empty one."""
    parts = [source] if Path(source).exists() else source.split(SEPARATOR)
    if not all(parts):
        raise GrailError(f"{source!r} joins a text without a name; leave out the {SEPARATOR}")
    return parts


def absolute(source: str) -> str:
    """The same name wherever it is read: files by their full paths."""
    return SEPARATOR.join(os.path.abspath(part) if Path(part).is_file() else part for part in parts_of(source))


def in_common(source: str, given: str) -> set[str]:
    """The texts that are in both, files by their full paths."""
    found, known = ({os.path.realpath(p) if Path(p).is_file() else p for p in parts_of(s)} for s in (source, given))
    return found & known


def shares(count: int, parts: int) -> list[int]:
    """How many of `count` windows each part gives, the first ones one more where it does not divide."""
    return [count // parts + (i < count % parts) for i in range(parts)]
