"""The tokenizer of a checkpoint folder; its own code is never run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.carried import CARRIED, TOKENIZER_CONFIG, data_files, without_code
from ..checkpoint.reader import read_json
from ..documents import check_regular
from ..errors import GrailError

TRIED = "one, two"


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds files of a tokenizer; Python files and folders are none."""
    return any(file.suffix != ".py" and not file.is_dir() for file in folder.glob("tokenizer*"))


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; raises GrailError naming the folder when there is none that works, and the file that is
    known to be the reason."""
    from transformers import AutoTokenizer

    for pattern in CARRIED:
        for file in filter(Path.exists, folder.glob(pattern)):
            check_regular(file)  # a pipe would be waited for
    try:
        with _without_code(folder) as data:
            tokenizer = AutoTokenizer.from_pretrained(data, trust_remote_code=False)
            tokenizer(TRIED, add_special_tokens=False)  # some wrong values show when there is text
            return tokenizer
    except GrailError:
        raise
    except Exception as error:
        raise GrailError(
            f"{folder} has no usable tokenizer ({type(error).__name__}); add its files, or give token ids in a "
            f".safetensors file"
        ) from error


@contextmanager
def _without_code(folder: Path) -> Iterator[Path]:
    """The folder, or links to its data where tokenizer_config.json names code.

    AutoTokenizer may choose another class where code is named, even if it does not run it: text must be tokenised as
    the result will do it, which carries no code.
    """
    file = folder / TOKENIZER_CONFIG
    named = read_json(file) if file.exists() else {}
    if named == without_code(named):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="grail-tokenizer-") as made:
        for data in (*data_files(folder), folder / "config.json"):
            link = Path(made) / data.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(data.resolve())
        (Path(made) / TOKENIZER_CONFIG).unlink()
        (Path(made) / TOKENIZER_CONFIG).write_text(json.dumps(without_code(named)), encoding="utf-8")
        yield Path(made)
