"""Several texts as one: `a+b` stands for as many windows of each."""

from __future__ import annotations

import os
from pathlib import Path

SEPARATOR = "+"


def parts_of(source: str) -> list[str]:
    """The texts that a name stands for; an existing file of that name is one."""
    return [source] if Path(source).exists() else source.split(SEPARATOR)


def absolute(source: str) -> str:
    """The same name wherever it is read: files by their full paths."""
    return SEPARATOR.join(os.path.abspath(part) if Path(part).is_file() else part for part in parts_of(source))


def shares(count: int, parts: int) -> list[int]:
    """How many of `count` windows each part gives, the first ones one more where it does not divide."""
    return [count // parts + (i < count % parts) for i in range(parts)]
