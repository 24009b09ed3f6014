"""Windows of token ids [N, L] for calibration and evaluation (CONTRACTS, Calibration and evaluation)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import SafetensorsFolder
from ..errors import GrailError
from .sources import documents

JOINER = {"builtin": "\n\n", "wikitext2": "\n\n"}
BUILTIN_LENGTH, DEFAULT_LENGTH = 512, 2048
ENOUGH = 8


@dataclass
class Windows:
    """ids [N, L]; source is what the user named; sha256 over the ids."""

    ids: Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, ids: Tensor, source: str) -> Windows:
        return cls(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def default_length(source: Any) -> int:
    return BUILTIN_LENGTH if source == "builtin" else DEFAULT_LENGTH


def load_calibration(
    source: Any, tokenizer: Callable[[], Any], vocabulary: int, *, samples: int, seq_len: int | None, seed: int
) -> Windows:
    """`samples` windows of `seq_len` tokens at random offsets drawn with `seed`.

    source: "builtin", "wikitext2", "c4", a path, or (Python) a tensor, a list of tensors or an iterable of batches.
    `tokenizer` is only called when there is text to tokenise. Raises GrailError naming a source without a full window.
    """
    if not isinstance(source, (str, Path)):
        ids = _from_batches(source, samples, seq_len)
        return Windows.of(_checked(ids, vocabulary, "calibration"), "given in Python")
    source = str(source)
    if source.endswith(".safetensors"):
        ids = _pretokenised(Path(source), vocabulary)[:samples, :seq_len]
        return Windows.of(ids.contiguous(), source)
    length = seq_len or default_length(source)
    tokens = _tokens(source, "calibration", tokenizer(), enough=ENOUGH * samples * length)
    if len(tokens) < length:
        raise GrailError(
            f"--calibration {source} holds {len(tokens)} tokens, less than one window of {length}; "
            f"give more text or a smaller --seq-len"
        )
    offsets = torch.randint(len(tokens) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return Windows.of(torch.stack([tokens[o : o + length] for o in offsets.tolist()]), source)


def evaluation_windows(
    source: str, tokenizer: Callable[[], Any], vocabulary: int, *, seq_len: int, samples: int | None = None
) -> Windows | None:
    """The held-out part of a source as non-overlapping windows, the last partial one dropped; None when there is no
    full window (a pre-tokenised file is evaluated on all of its windows)."""
    if source.endswith(".safetensors"):
        ids = _pretokenised(Path(source), vocabulary)
        return Windows.of(ids[:samples].contiguous(), source)
    tokens = _tokens(source, "evaluation", tokenizer())
    count = len(tokens) // seq_len
    if not count:
        return None
    ids = tokens[: count * seq_len].view(count, seq_len)[:samples]
    return Windows.of(ids.contiguous(), source)


def _tokens(source: str, split: str, tokenizer: Any, enough: int | None = None) -> Tensor:
    """All tokens of a split, int64 [T]: built-in and wikitext joined by blank lines, other records by EOS."""
    joiner = JOINER.get(source)
    if joiner is not None:
        text = joiner.join(documents(source, split))
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    pieces: list[int] = []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in documents(source, split):
        if pieces:
            pieces += eos
        pieces += tokenizer(text, add_special_tokens=False).input_ids
        if enough is not None and len(pieces) >= enough:
            break
    return torch.tensor(pieces, dtype=torch.int64)


def _pretokenised(path: Path, vocabulary: int) -> Tensor:
    if not path.is_file():
        raise GrailError(f"--calibration {path}: no such file")
    folder = SafetensorsFolder(path)
    if "input_ids" not in folder:
        raise GrailError(f"{path} holds no tensor input_ids [windows, length]")
    return _checked(folder.get("input_ids"), vocabulary, str(path))


def _from_batches(source: Any, samples: int, seq_len: int | None) -> Tensor:
    batches: Iterable = [source] if isinstance(source, Tensor) else source
    found: list[Tensor] = []
    for batch in batches:
        ids = torch.as_tensor(batch["input_ids"] if hasattr(batch, "keys") else batch)
        found += list(ids[None] if ids.dim() == 1 else ids)
        if len(found) >= samples:
            break
    if not found or len({row.shape for row in found}) > 1:
        raise GrailError("calibration: expected at least one window, all of the same length")
    return torch.stack(found[:samples])[:, :seq_len].cpu()


def _checked(ids: Tensor, vocabulary: int, where: str) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[1] < 2 or not len(ids):
        raise GrailError(
            f"{where}: input_ids must be integers [windows, length >= 2]; got {ids.dtype} {list(ids.shape)}"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise GrailError(f"{where}: token ids must lie within the model's vocabulary of {vocabulary}")
    return ids.long()
