"""Windows of token ids [N, L] for calibration and evaluation (CONTRACTS, Calibration and evaluation)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import SafetensorsFolder
from ..errors import GrailError
from .sources import BUILTIN, documents, no_such_text

JOINER = dict.fromkeys([*BUILTIN, "wikitext2"], "\n\n")
BUILTIN_LENGTH, DEFAULT_LENGTH = 512, 2048
ENOUGH = 8
TRIAL_SHARE = 5
"""Windows that only decide are at most one of so many."""
TRIAL_STRETCH = 8
"""They lie in the last of so many parts of the text, if they fit."""


@dataclass
class Windows:
    """ids [N, L]; source is what the user named; sha256 over the ids. trial [V, L] or None: windows of the same source
    that the others do not overlap, for a choice between candidates."""

    ids: Tensor
    source: str
    sha256: str
    trial: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, source: str, trial: Tensor | None = None) -> Windows:
        hashed = hashlib.sha256(ids.numpy().tobytes())
        if trial is not None:
            hashed.update(trial.numpy().tobytes())
        return cls(ids, source, hashed.hexdigest(), trial)

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def default_length(source: Any) -> int:
    return BUILTIN_LENGTH if source in BUILTIN else DEFAULT_LENGTH


def load_calibration(
    source: Any,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    trial: int = 0,
) -> Windows:
    """`samples` windows of `seq_len` tokens at random offsets drawn with `seed`, and `trial` (at most a fifth of what
    there is) from the end of the text, which the others do not reach.

    source: "builtin", "wikitext2", "c4", a path, or (Python) a tensor, a list of tensors or an iterable of batches.
    `tokenizer` is only called when there is text to tokenise. Raises GrailError naming a source without a full window,
    or with `trial` one without enough for both.
    """
    if not isinstance(source, (str, Path)):
        ids = _checked(_from_batches(source, samples + trial, seq_len), vocabulary, "calibration")
        return _parted(ids, "given in Python", samples, trial)
    source = str(source)
    if source.endswith(".safetensors"):
        ids = _pretokenised(Path(source), vocabulary, "--calibration", seq_len)[: samples + trial]
        return _parted(ids.contiguous(), source, samples, trial)
    length = seq_len or default_length(source)
    texts = documents(source, "calibration", "--calibration")
    tokens = _tokens(source, texts, tokenizer(), vocabulary, enough=ENOUGH * (samples + trial) * length)
    if len(tokens) < length:
        if not len(tokens):
            raise GrailError(f"--calibration {source} is empty; give more text")
        raise GrailError(
            f"--calibration {source} holds {len(tokens)} tokens, less than one window of {length}; "
            f"give more text or a smaller --seq-len"
        )
    reserved = _reserved(len(tokens), length, trial, source)
    offsets = torch.arange((reserved[0] if reserved else len(tokens)) - length + 1)
    drawn = offsets[torch.randint(len(offsets), (samples,), generator=torch.Generator().manual_seed(seed))]
    ids, held = (
        torch.stack([tokens[o : o + length] for o in some]) if some else None for some in (drawn.tolist(), reserved)
    )
    return Windows.of(ids, source, held)


def evaluation_windows(
    source: str,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    *,
    seq_len: int | None,
    samples: int | None = None,
    held_out: bool = True,
    option: str = "--eval",
) -> Windows | None:
    """Non-overlapping windows of a source, the last partial one dropped; None when there is no full window.

    held_out: of a local text file only the part that calibration never sees (built-in text and data sets have splits
    of their own; a pre-tokenised file is always evaluated whole). seq_len None: the file's own, or the default.
    """
    if source.endswith(".safetensors"):
        ids = _pretokenised(Path(source), vocabulary, option, seq_len)
        return Windows.of(ids[:samples].contiguous(), source)
    seq_len = seq_len or default_length(source)
    split = "evaluation" if held_out else "all"
    tokens = _tokens(source, documents(source, split, option), tokenizer(), vocabulary)
    count = len(tokens) // seq_len
    if not count:
        return None
    ids = tokens[: count * seq_len].view(count, seq_len)[:samples]
    return Windows.of(ids.contiguous(), source)


def _reserved(tokens: int, length: int, trial: int, source: str) -> list[int]:
    """Offsets of the windows for a choice, spread over the end of the text: one between the others would be about
    what they are about, and not tell what was learnt from what was learnt by heart."""
    if not trial:
        return []
    count = min(trial, tokens // (TRIAL_SHARE * length))
    if not count:
        raise GrailError(_too_little(source, f"{tokens} tokens", f"{TRIAL_SHARE} windows of {length}"))
    room = max(tokens // TRIAL_STRETCH, count * length)
    return [tokens - room + i * (room - length) // max(count - 1, 1) for i in range(count)]


def _parted(ids_NL: Tensor, source: str, samples: int, trial: int) -> Windows:
    """Of windows that are cut already the last ones for a choice, and the others: as many as asked for where there are
    enough of both."""
    if not trial:
        return Windows.of(ids_NL, source)
    enough = len(ids_NL) >= samples + trial
    count = trial if enough else min(trial, len(ids_NL) // TRIAL_SHARE)
    if not count:
        raise GrailError(_too_little(source, f"{len(ids_NL)} windows", f"{TRIAL_SHARE}"))
    return Windows.of(ids_NL[:-count], source, ids_NL[-count:].clone())


def _too_little(source: str, there: str, needed: str) -> str:
    return (
        f"--calibration {source} holds {there}, and --target stream needs at least {needed}, a part of which only "
        f"decides about alpha and ridge; give more text, or numbers for --alpha and --ridge"
    )


def _tokens(source: str, texts: Iterator[str], tokenizer: Any, vocabulary: int, enough: int | None = None) -> Tensor:
    """Tokens of a source's texts, int64 [T]: built-in and wikitext joined by blank lines, other records by EOS."""
    pieces: list[int] = []
    joiner = JOINER.get(source)
    if joiner is not None:
        pieces = tokenizer(joiner.join(texts), add_special_tokens=False).input_ids
    else:
        eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        for text in texts:
            pieces += eos * bool(pieces) + tokenizer(text, add_special_tokens=False).input_ids
            if enough is not None and len(pieces) >= enough:
                break
    tokens = torch.tensor(pieces, dtype=torch.int64)
    return _within(tokens, vocabulary, f"{source}, tokenised") if len(tokens) else tokens


def _pretokenised(path: Path, vocabulary: int, option: str, seq_len: int | None) -> Tensor:
    if not path.is_file():
        raise GrailError(no_such_text(str(path), option))
    folder = SafetensorsFolder(path)
    if "input_ids" not in folder:
        raise GrailError(f"{path} holds no tensor input_ids [windows, length]")
    ids = _checked(folder.get("input_ids"), vocabulary, str(path))
    if seq_len is not None and seq_len > ids.shape[1]:
        raise GrailError(f"{path} holds windows of {ids.shape[1]} tokens; --seq-len {seq_len} is longer")
    return ids[:, :seq_len]


def _from_batches(source: Any, samples: int, seq_len: int | None) -> Tensor:
    found: list[Tensor] = []
    try:
        for batch in [source] if isinstance(source, Tensor) else source:
            ids = torch.as_tensor(batch["input_ids"] if hasattr(batch, "keys") else batch)
            found += list(ids[None] if ids.dim() == 1 else ids)
            if len(found) >= samples:
                break
        return torch.stack(found[:samples])[:, :seq_len].cpu()
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise GrailError(
            "calibration: expected token ids [windows, length]: a tensor, a list of tensors of one length, or batches "
            f"with input_ids ({type(error).__name__}: {error})"
        ) from error


def _checked(ids: Tensor, vocabulary: int, where: str) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[1] < 2 or not len(ids):
        found = f"{ids.dtype} {list(ids.shape)}"
        raise GrailError(f"{where}: input_ids must be integers [windows, length >= 2]; got {found}")
    return _within(ids.long(), vocabulary, where)


def _within(ids: Tensor, vocabulary: int, where: str) -> Tensor:
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise GrailError(f"{where}: token id {int(outside[0])} is not within the model's vocabulary of {vocabulary}")
    return ids
