"""Write a checkpoint shard by shard into OUT.partial, each shard beside and renamed; rename the folder at the end.

DESIGN section 6: a run is a sequence of committed steps: temporary name, fsync, rename, then a journal line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import GrailError
from .reader import DTYPES, INDEX, read_json

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json",
)  # fmt: skip
CARRIED_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
LICENCES, LICENCE_SUFFIXES = ("LICENSE*", "NOTICE*"), {"", ".txt", ".md", ".rst", ".html", ".pdf"}
TOKENIZER_CONFIG = "tokenizer_config.json"
CODE_FIELDS = ("auto_map", "custom_pipelines")
"""Fields of config.json and tokenizer_config.json that name Python code to be run under trust_remote_code."""


def without_code(config: dict) -> dict:
    """A configuration without the fields that name code, of its own folder or of another repository."""
    return {key: value for key, value in config.items() if key not in CODE_FIELDS}


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name, dtype, shape and a source of raw uint8 chunks in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        flat = tensor.detach().cpu().contiguous()
        raw = flat.reshape(-1).view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        return cls(name, tensor.dtype, tuple(tensor.shape), (raw,))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class OutputFolder:
    """OUT.partial, locked while it is worked in; `finish` renames it to OUT.

    Used as a context manager: an error removes the partial folder, so that bad input leaves nothing behind.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False):
        self.path = Path(os.path.realpath(path))
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite
        self.weight_map: dict[str, str] = {}
        self.written: dict[str, tuple[str, list[int]]] = {}
        self.total_bytes = 0
        self.total_parameters = 0

    def check(self, *inputs: Path) -> None:
        """Refuse an occupied output before any work is done, and one that holds an input, which would be deleted."""
        for source in inputs:
            if Path(os.path.realpath(source)).is_relative_to(self.path):
                raise GrailError(f"--output {self.path} holds the input {source}; choose another folder")
        if self.path.is_file():
            raise GrailError(f"--output {self.path} is a file; name a folder")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.overwrite:
                raise GrailError(f"--output {self.path} exists and is not empty; choose another, or add --overwrite")
            if not any(any(self.path.glob(kind)) for kind in ("grail.json", "config.json", "*.safetensors")):
                raise GrailError(
                    f"--output {self.path} holds no model: --overwrite would delete other files; choose another folder"
                )
            if Path.cwd().is_relative_to(self.path):
                raise GrailError(f"--output {self.path} holds the current folder; choose another")
        if self.partial.exists() and not self._is_ours():
            raise GrailError(
                f"{self.partial} is in the way and was not made by grail; move it or choose another output"
            )

    def _is_ours(self) -> bool:
        """A working folder of an earlier run (or nothing at all)."""
        left = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else {""}
        return not left or bool(left & {"lock", "journal.jsonl"})

    def __enter__(self) -> OutputFolder:
        self.check()
        self._made = [parent for parent in self.partial.parents if not parent.exists()]
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.partial / "lock", "a")
        except OSError as error:
            raise GrailError(f"--output {self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise GrailError(
                f"another run is working in {self.partial}; wait for it or choose another output"
            ) from error
        for left_over in self.partial.iterdir():
            if left_over.name != "lock":
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._lock.close()
        if self.partial.exists():
            shutil.rmtree(self.partial)
            for parent in self._made:
                if not any(parent.iterdir()):
                    parent.rmdir()

    def write_shard(self, file: str, pieces: list[Piece]) -> None:
        """Commit one safetensors file; the tensors are streamed in the order given."""
        temporary = self.partial / (file + ".tmp")
        with open(temporary, "wb") as handle:
            for block in _serialise(pieces):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, self.partial / file)
        for piece in pieces:
            self.weight_map[piece.name] = file
            self.written[piece.name] = (DTYPE_NAMES[piece.dtype], list(piece.shape))
            self.total_bytes += piece.nbytes
            self.total_parameters += torch.Size(piece.shape).numel()
        self.journal({"step": "shard", "file": file, "tensors": len(pieces)})

    def journal(self, line: dict) -> None:
        """Append one committed step."""
        with open(self.partial / "journal.jsonl", "a") as handle:
            handle.write(json.dumps(line, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def write_json(self, file: str, value: dict) -> None:
        """Commit one JSON file: two spaces, sorted where the value is, newline at the end."""
        self.write_text(file, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, file: str, text: str) -> None:
        """Commit one text file, UTF-8."""
        temporary = self.partial / (file + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.partial / file)

    def carry_over(self, source: Path) -> None:
        """Copy tokenizer, chat template, generation config and licence files, following links.

        Data only: whoever compresses a folder, or trusts the class file that GRAIL puts beside a result, has not agreed
        to run the source's code. A file that has been written already stays as it was written.
        """
        for file in data_files(source):
            target = self.partial / file.relative_to(source)
            if target.exists():
                continue
            target.parent.mkdir(exist_ok=True)
            if file.name == TOKENIZER_CONFIG and (config := read_json(file)) != without_code(config):
                self.write_json(file.name, without_code(config))
            else:
                shutil.copyfile(file, target)

    def write_index(self) -> None:
        """The shard index, written last of the weights."""
        metadata = {"total_size": self.total_bytes, "total_parameters": self.total_parameters}
        self.write_json(INDEX, {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))})

    def finish(self) -> Path:
        """Drop the working files and put the folder in its place."""
        for name in ("lock", "journal.jsonl"):
            (self.partial / name).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)
        return self.path


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


def _serialise(pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    """The safetensors format: header length, header padded to 8 bytes, data without gaps."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.nbytes
        entry = {"dtype": DTYPE_NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [offset, end]}
        header[piece.name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for piece in pieces:
        for chunk in piece.chunks:
            yield memoryview(chunk.numpy())
