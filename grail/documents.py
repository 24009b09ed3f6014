"""JSON files that say what something is: config.json, grail.json, run.json."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import GrailError

LARGEST = 2**25
"""Bytes; the index of the largest models has some millions."""
LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"}
LABELS, MOST_LABELS = "num_labels", 10**6


def check_regular(path: Path, most: int | None = None) -> int:
    """The size of a file; raises GrailError for one that may never end (a device, a pipe, a socket), which a link in
    the folder can name, and for one of more than `most` bytes."""
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise GrailError(f"{path} is a device or a pipe; put a file in its place")
    if most is not None and found.st_size > most:
        raise GrailError(f"{path} is larger than such a file can be ({found.st_size:,} bytes); fetch it again")
    return found.st_size


def read_json(path: Path) -> dict:
    """A JSON object from a file, or GrailError naming it."""
    try:
        check_regular(path, LARGEST)
        value = json.loads(path.read_text(encoding="utf-8"))
    except GrailError:
        raise
    except OSError as error:
        raise GrailError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise GrailError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise GrailError(f"{path} must hold a JSON object")
    return value


def check_writable(value: Any, where: str | Path) -> None:
    """Raises GrailError naming the field of what no JSON file can hold, though Python reads it from one: numbers that
    are none, and text with half a character."""
    left = [("", value)]
    while left:
        field, value = left.pop()
        if isinstance(value, (dict, list)):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            for key, entry in inner:
                left += [(f"a name in {field or 'it'}", str(key)), (f"{field}.{key}" if field else str(key), entry)]
        elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, str) and not is_text(value)):
            raise GrailError(f"{where}: {field} is {value!a}, which cannot be written as JSON; correct it")


def is_utf8(value: Any) -> bool:
    """Whether a name or text could be written to a file, or given to a library; what is neither could."""
    if not isinstance(value, (str, os.PathLike)):
        return True
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:  # Python's own way to hold other bytes, as of a file's name
        return False
    return True


def not_utf8(option: str, value: Any) -> str:
    """The sentence for it."""
    return f"{option} {value} is no UTF-8: rename it, or write it in UTF-8"


def check_counts(config: dict, where: str | Path, tensors: int) -> None:
    """Raises GrailError for a number of layers or of labels for which transformers would make lists beyond all memory
    before it sees that they are wrong. tensors: how many the weights hold; a layer has one at least."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, where, tensors)
        most = tensors if key in LAYERS else MOST_LABELS if key == LABELS else math.inf
        if isinstance(value, (int, float)) and value > most:
            known = f"the weights hold {tensors} tensors" if key in LAYERS else f"there may be {most}"
            raise GrailError(f"{where}: {key} is {value:.15g}, and {known}; correct it")


def _names(sentence: str, file: Path) -> bool:
    """Whether the file is told, or another one of its folder; the name of a folder alone may be any word."""
    folder = str(file.parent)
    beside = rf"(?<![\w./-]){re.escape(folder)}/" + "?" * ("/" in folder)
    return str(file) in sentence or (file.parent != Path() and re.search(beside, sentence) is not None)


def is_text(value: object) -> bool:
    """Whether a value is text that a file can hold; half a character, which JSON can say, is none."""
    return isinstance(value, str) and is_utf8(value)


@contextmanager
def about(file: Path) -> Iterator[None]:
    """What is wrong within is told with the file's name."""
    try:
        yield
    except GrailError as error:
        if _names(str(error), file):
            raise
        raise type(error)(f"{file}: {error}") from error
