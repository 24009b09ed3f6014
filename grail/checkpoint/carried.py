"""What a result takes over from its source beside the weights: data, never code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..bars import without_warnings
from ..documents import read_json
from ..errors import GrailError, first_line
from .disk import stamp

GENERATION = "generation_config.json"
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", GENERATION,
)  # fmt: skip
CARRIED_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
LICENCES, LICENCE_SUFFIXES = ("LICENSE*", "NOTICE*"), {"", ".txt", ".md", ".rst", ".html", ".pdf"}
TOKENIZER_CONFIG = "tokenizer_config.json"
CODE_FIELDS = (
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation",
)  # fmt: skip
"""Fields of config.json and tokenizer_config.json that name Python code to be run under trust_remote_code, or kernels
to be fetched from the hub."""


def without_code(config: dict) -> dict:
    """A configuration without the fields that name code, of its own folder or of another repository."""
    return {key: value for key, value in config.items() if key not in CODE_FIELDS}


def check_carried(source: Path) -> None:
    """Raises GrailError naming a file that the result would carry and that transformers could not open it with."""
    from transformers import GenerationConfig

    if not (file := source / GENERATION).is_file():
        return
    read_json(file)
    try:
        with without_warnings():
            GenerationConfig.from_pretrained(source)
    except Exception as error:  # whatever the class makes of values that cannot be
        raise GrailError(
            f"{file}: transformers cannot use it ({first_line(error)}); correct it, or take it away"
        ) from error


def stamps(source: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the files beside the weights."""
    return {file: stamp(file) for file in data_files(source)}


def data_files(source: Path) -> Iterator[Path]:
    """The files beside the weights that a result needs too."""
    kinds = (
        (CARRIED, CARRIED_SUFFIXES),
        (LICENCES, LICENCE_SUFFIXES),
        (("additional_chat_templates/*",), {".jinja"}),
    )
    for patterns, suffixes in kinds:
        for pattern in patterns:
            yield from (f for f in sorted(source.glob(pattern)) if f.is_file() and f.suffix.lower() in suffixes)
