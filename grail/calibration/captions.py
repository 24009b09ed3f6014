"""Captions: short texts, one to a line, for networks that read text beside images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..documents import check_regular, is_text
from ..errors import GrailError
from .given import readable

FIELDS = ("text", "caption")


def captions(
    source: Any, tokenizer: Callable[[list[str]], Tensor] | None, samples: int, seed: int, batch: int
) -> tuple[list[Tensor], dict]:
    """(token ids in batches int64 [B, L], what they are): `samples` captions drawn with the seed. source: a .txt file
    (a caption to a line), a .jsonl file (field "text" or "caption"), a list of strings, or token ids [N, L]. Raises
    GrailError naming what cannot be read."""
    if isinstance(source, Tensor):
        ids, name = _ids(source), "given in Python"
    else:
        texts, name = _texts(source)
        if tokenizer is None:
            raise GrailError("captions need the network's tokenizer: give their token ids, a tensor [captions, length]")
        ids = _ids(tokenizer(texts))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    chosen = ids[order[:samples].sort().values].contiguous()
    digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    return list(chosen.split(batch)), {
        "source": name,
        "sha256": digest,
        "captions": len(chosen),
        "length": chosen.shape[1],
    }


def _ids(source: Any) -> Tensor:
    if not isinstance(source, Tensor):
        raise GrailError(
            f"--calibration-text: the tokenizer gives a {type(source).__name__}, where token ids are needed, a tensor "
            f"[captions, length]"
        )
    source = readable(source, "--calibration-text")
    if source.dim() != 2 or source.is_floating_point() or source.dtype == torch.bool or not source.numel():
        raise GrailError(
            f"--calibration-text: token ids are whole numbers [captions, length], got {list(source.shape)} of "
            f"{source.dtype}"
        )
    return source.cpu().long()


def _texts(source: Any) -> tuple[list[str], str]:
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
        found, name = [text for text in source if text.strip()], "given in Python"
    elif isinstance(source, (str, Path)):
        found, name = _read(Path(source)), str(source)
    else:
        raise GrailError(f"--calibration-text: give a file or a list of captions, not a {type(source).__name__}")
    if not found:
        raise GrailError(f"--calibration-text {name}: there are no captions in it")
    return found, name


def _read(file: Path) -> list[str]:
    if file.suffix not in (".txt", ".jsonl"):
        raise GrailError(f"--calibration-text {file}: a .txt (a caption to a line) or .jsonl file is read")
    try:
        check_regular(file)
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise GrailError(f"--calibration-text {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GrailError(f"--calibration-text {file} is not UTF-8 text") from error
    lines = [line for line in lines if line]
    return lines if file.suffix == ".txt" else [_field(file, number, line) for number, line in enumerate(lines, 1)]


def _field(file: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GrailError(f"--calibration-text {file}, line {number}: not JSON") from error
    found = entry if isinstance(entry, str) else None
    if isinstance(entry, dict):
        found = next((entry[name] for name in FIELDS if isinstance(entry.get(name), str)), None)
    if found and not is_text(found):  # written as an escape
        raise GrailError(f"--calibration-text {file}, line {number}: half a character")
    if not found or not found.strip():
        raise GrailError(f'--calibration-text {file}, line {number}: no field "text" or "caption"')
    return found.strip()
