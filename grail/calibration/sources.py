"""Where text comes from. Each source gives documents for one of two splits, "calibration" and "evaluation"."""

from __future__ import annotations

import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path

from ..bars import without_bars
from ..errors import GrailError
from ..hub import at_once
from .builtin import docstrings, topics

BUILTIN = {"builtin": topics, "docstrings": docstrings}
"""Text that every machine has."""
LARGE, BLOCK = 2**22, 2**18
"""Characters of a text that is tokenised in blocks, and of a block at most."""
LOCAL_HELD_OUT = 10
C4_EVALUATION_DOCUMENTS = 1100


def documents(source: str, split: str, option: str = "--calibration") -> Iterator[str]:
    """Documents of a named source or a local .txt / .jsonl file; split "all" is the whole of a local file, and
    "evaluation" elsewhere. Raises GrailError naming the option and the source when it cannot be had."""
    if source in BUILTIN:
        return iter(BUILTIN[source](split))
    if source in _HUB:
        return _hub(source, split, option)
    path = Path(source)
    if not path.is_file():
        raise GrailError(no_such_text(source, option))
    if path.suffix == ".jsonl":
        return iter(_held_out_tail(_jsonl(path), split))
    if path.suffix == ".txt":
        return iter(_text_split(path, split))
    raise GrailError(
        f"{option} {path}: text must be .txt, .jsonl or .safetensors, not {path.suffix or 'without a suffix'}"
    )


def blocks(text: str) -> Iterator[str]:
    """A text in parts, which together are the text: one, unless it is large. Tokenised at once that would take more
    than a hundred times its size. They end after a line break, in text without any after a space, else anywhere."""
    start, size = 0, BLOCK if len(text) > LARGE else len(text)
    while len(text) - start > size:
        within = (text.rfind(end, start, start + size) for end in "\n ")
        stop = next((place for place in within if place >= 0), start + size - 1) + 1
        yield text[start:stop]
        start = stop
    yield text[start:]


def is_named(source: str) -> bool:
    """Whether it is no file."""
    return source in BUILTIN or source in _HUB


def no_such_text(source: str, option: str) -> str:
    """The sentence for a source that is neither a file nor a known name."""
    known = ", ".join([*BUILTIN, *_HUB])
    if Path(source).is_dir():
        return f"{option} {source}: is a folder; name one file (.txt, .jsonl or .safetensors), or one of {known}"
    return f"{option} {source}: no such file (.txt, .jsonl or .safetensors), and not one of {known}"


def _jsonl(path: Path) -> list[str]:
    records = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise GrailError(f'{path}, line {number}: expected a JSON object with a field "text"') from error
        if not isinstance(text, str):
            raise GrailError(f'{path}, line {number}: the field "text" must be a string')
        if any("\ud800" <= c <= "\udfff" for c in text):  # written as an escape
            raise GrailError(f'{path}, line {number}: the field "text" holds half a character')
        records.append(text)
    return records


def _held_out_tail(records: list[str], split: str) -> list[str]:
    """The last tenth of the records is for evaluation."""
    if split == "all":
        return records
    cut = len(records) - len(records) // LOCAL_HELD_OUT
    return records[:cut] if split == "calibration" else records[cut:]


def _text_split(path: Path, split: str) -> list[str]:
    """The last tenth of the characters, from the next line break on, is for evaluation."""
    text = _read(path)
    if split == "all":
        return [text]
    cut = text.find("\n", len(text) - len(text) // LOCAL_HELD_OUT) + 1 or len(text)
    return [text[:cut] if split == "calibration" else text[cut:]]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise GrailError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "LATIN1"
        raise GrailError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, as with iconv -f {encoding} -t UTF-8"
        ) from error


_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "evaluation": "test"}, None),
    "c4": (
        "allenai/c4",
        None,
        {"calibration": "train", "evaluation": "validation"},
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "ptb": None,
}


def _hub(source: str, split: str, option: str) -> Iterator[str]:
    if source == "ptb":
        raise GrailError(
            f"{option} ptb: the hub's copy needs a loading script, which is never run; give a local .txt or .jsonl"
        )
    import datasets

    repository, configuration, splits, files = _HUB[source]
    split = "calibration" if split == "calibration" else "evaluation"
    try:
        with without_bars(datasets), at_once(repository, dataset=True):
            part = splits[split]
            rows = datasets.load_dataset(
                repository, configuration, split=part, data_files=files and {part: files[part]}
            )
    except Exception as error:  # datasets, httpx and OSError: which one depends on how the network is missing
        raise GrailError(
            f"{option} {source}: {repository} could not be fetched from the hub ({type(error).__name__}); "
            f"connect, or give a local .txt, .jsonl or .safetensors"
        ) from error
    limit = C4_EVALUATION_DOCUMENTS if source == "c4" and split == "evaluation" else len(rows)
    return (row["text"] for row in rows.select(range(min(limit, len(rows)))))
