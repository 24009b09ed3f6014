"""Windows of token ids [N, L] for calibration and evaluation (CONTRACTS, Calibration and evaluation)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GrailError
from ..machine import available_memory
from ..numbers import bytes_of
from ..recipe import TRIAL_SHARE
from .lengths import default_length
from .mixture import TOKENISED, parts_of, shares
from .sources import BUILTIN, blocks, documents
from .tokens import checked, from_batches, pretokenised, stored_weights, weigh, within

JOINER = dict.fromkeys([*BUILTIN, "wikitext2"], "\n\n")
ENOUGH = 8
"""Windows are drawn from so many times their tokens: of records, and of the blocks of a large text, the first that make
them up."""
TRIAL_STRETCH = 8
"""They lie in the last of so many parts of the text, if they fit."""


@dataclass
class Windows:
    """ids [N, L]; source is what the user named; sha256 over all tensors. trial [V, L] or None: windows of the same
    source that the others do not overlap, for a choice between candidates. weights [N, L] and trial_weights [V, L],
    float32, or None: how much each token counts, 1 in the mean of each. distinct: tokens of the text that the
    windows cover, which overlap where it is short (None: they were given as windows). scarce: the source, or that of
    its parts, that is too little to spare any for a choice (None: there is enough, or it was not looked for)."""

    ids: Tensor
    source: str
    sha256: str
    trial: Tensor | None = None
    weights: Tensor | None = None
    trial_weights: Tensor | None = None
    distinct: int | None = None
    scarce: str | None = None

    @classmethod
    def of(
        cls,
        ids: Tensor,
        source: str,
        trial: Tensor | None = None,
        weights: Tensor | None = None,
        trial_weights: Tensor | None = None,
    ) -> Windows:
        hashed = hashlib.sha256(ids.numpy().tobytes())
        for more in (trial, weights, trial_weights):
            if more is not None:
                hashed.update(more.numpy().tobytes())
        return cls(ids, source, hashed.hexdigest(), trial, weights, trial_weights)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def different(self) -> int:
        """Tokens that say something of their own."""
        return self.tokens if self.distinct is None else self.distinct


def load_calibration(
    source: Any,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    trial: int = 0,
    chooses: bool = True,
    memory: int | None = None,
    longest: int | None = None,
) -> Windows:
    """`samples` windows of `seq_len` tokens at random offsets drawn with `seed`, and, where it `chooses`, `trial` (at
    most a fifth of what there is; none where that is less than one, also in one of several texts) from the end of the
    text, which the others do not reach.

    source: "builtin", "wikitext2", "c4", a path, several of these joined by "+" (as many windows each), or (Python) a
    tensor, a list of tensors or an iterable of batches. `tokenizer` is only called when there is text to tokenise.
    memory: a budget in bytes; longest: as of `default_length`. Raises GrailError naming a source without a full window,
    and for more windows than there is memory for, before there are any.
    """
    if not isinstance(source, (str, Path)):
        trial = trial if chooses else 0  # what is not needed is not taken from an iterable
        ids, weights = from_batches(source, samples + trial, seq_len)
        ids = checked(ids, vocabulary, "calibration")
        return _parted(ids, weights, "given in Python", samples, trial, chooses, "calibration")
    parts = parts_of(str(source))
    if not all(part.endswith(TOKENISED) for part in parts):  # which ends by itself; text is drawn from for ever
        _check_room(samples, seq_len or default_length(source, longest), memory)
    if len(parts) == 1:
        length = seq_len if parts[0].endswith(TOKENISED) else seq_len or default_length(source, longest)
        return _of_one(parts[0], tokenizer, vocabulary, samples, length, seed, trial, chooses)
    if samples < len(parts):
        raise GrailError(f"--calibration {source}: --samples {samples} is less than a window of each of its texts")
    length = seq_len or default_length(source, longest)
    counts = list(zip(parts, shares(samples, len(parts)), shares(max(trial, len(parts)), len(parts)), strict=True))

    def drawn(chooses: bool) -> list[Windows]:
        return [_of_one(part, tokenizer, vocabulary, some, length, seed, few, chooses) for part, some, few in counts]

    found = drawn(chooses and trial > 0)
    scarce = next((windows.scarce for windows in found if windows.scarce), None)
    if scarce and chooses:
        found = drawn(False)
    if any(windows.weights is not None for windows in found):
        raise GrailError(f"--calibration {source}: texts that are joined cannot have weights; give one file")
    held = [windows.trial for windows in found if windows.trial is not None]
    joined = Windows.of(torch.cat([windows.ids for windows in found]), str(source), torch.cat(held) if held else None)
    joined.distinct, joined.scarce = sum(windows.different for windows in found), scarce
    return joined


def _check_room(samples: int, length: int, memory: int | None) -> None:
    needed, room = samples * length * torch.int64.itemsize, memory or available_memory()
    if needed > room:
        most = f"--memory {bytes_of(room)}" if memory else f"the {bytes_of(room)} that are free here"
        raise GrailError(
            f"--samples {samples} windows of {length} tokens are {bytes_of(needed)}, more than {most}; take fewer, "
            f"or a smaller --seq-len"
        )


def _of_one(
    source: str,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    samples: int,
    length: int | None,
    seed: int,
    trial: int,
    chooses: bool,
) -> Windows:
    """length: None is that of windows that are cut already."""
    if source.endswith(TOKENISED):
        ids = pretokenised(Path(source), vocabulary, "--calibration", length)[: samples + trial].contiguous()
        return _parted(ids, stored_weights(Path(source)), source, samples, trial, chooses, source)
    texts = documents(source, "calibration", "--calibration")
    tokens = _tokens(source, texts, tokenizer(), vocabulary, enough=ENOUGH * (samples + trial * chooses) * length)
    if len(tokens) < length:
        if not len(tokens):
            raise GrailError(f"--calibration {source} is empty, or nothing that the tokenizer makes tokens of")
        raise GrailError(
            f"--calibration {source} holds {len(tokens)} tokens, less than one window of {length}; "
            f"give more text or a smaller --seq-len"
        )
    reserved = _reserved(len(tokens), length, trial)
    scarce = source if trial and not reserved else None
    reserved = reserved if chooses else []
    last = (reserved[0] if reserved else len(tokens)) - length
    drawn = torch.randint(last + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    every = tokens.unfold(0, length, 1)  # [T - L + 1, L], of no memory of its own
    found = Windows.of(every[drawn], source, every[reserved] if reserved else None)
    found.distinct = int((drawn.sort().values.diff().clamp(max=length)).sum()) + length
    found.scarce = scarce
    return found


def evaluation_windows(
    source: str,
    tokenizer: Callable[[], Any],
    vocabulary: int,
    *,
    seq_len: int | None,
    samples: int | None = None,
    held_out: bool = True,
    option: str = "--eval",
    longest: int | None = None,
) -> Windows | None:
    """Non-overlapping windows of a source, the last partial one dropped; None when there is no full window.

    held_out: of a local text file only the part that calibration never sees (built-in text and data sets have splits
    of their own; a pre-tokenised file is always evaluated whole). seq_len None: the file's own, or the default
    (longest: as of `default_length`). Of texts joined by "+" as many windows each, all of the shortest. A pre-tokenised
    file may have weights, but not among texts that are joined: raises GrailError for that.
    """
    parts = parts_of(source)
    seq_len = seq_len or (default_length(source, longest) if len(parts) > 1 else None)
    split = "evaluation" if held_out else "all"
    found = []
    for part in parts:
        if part.endswith(TOKENISED):
            found.append(pretokenised(Path(part), vocabulary, option, seq_len))
            continue
        length = seq_len or default_length(part, longest)
        enough = None if samples is None else samples * length
        tokens = _tokens(part, documents(part, split, option), tokenizer(), vocabulary, enough)
        found.append(tokens[: len(tokens) // length * length].view(-1, length))
    least = min(map(len, found))
    counts = [least] * len(parts) if samples is None else [min(least, n) for n in shares(samples, len(parts))]
    ids = torch.cat([windows[:count] for windows, count in zip(found, counts, strict=True)]).contiguous()
    if not len(ids):
        return None
    weights = [stored_weights(Path(part)) for part in parts if part.endswith(TOKENISED)]
    if len(parts) > 1 and any(own is not None for own in weights):
        raise GrailError(f"{option} {source}: texts that are joined cannot have weights; give one file")
    return Windows.of(ids, source, weights=weigh(weights[0], ids, source) if weights else None)


def _reserved(tokens: int, length: int, trial: int) -> list[int]:
    """Offsets of the windows for a choice, spread over the end of the text: one between the others would be about
    what they are about, and not tell what was learnt from what was learnt by heart."""
    count = min(trial, tokens // (TRIAL_SHARE * length))
    if not count:
        return []
    room = max(tokens // TRIAL_STRETCH, count * length)
    return [tokens - room + i * (room - length) // max(count - 1, 1) for i in range(count)]


def _parted(
    ids_NL: Tensor, weights: Tensor | None, source: str, samples: int, trial: int, chooses: bool, where: str
) -> Windows:
    """Of windows that are cut already the last ones for a choice, and the others: as many as asked for where there are
    enough of both. Windows of which no token counts decide nothing. where: what the weights are of."""
    total, counts = len(ids_NL), weigh(weights, ids_NL, where)
    few = trial if total >= samples + trial else min(trial, total // TRIAL_SHARE)
    scarce = trial > 0 and not (few and (counts is None or bool(counts[total - few :].any())))
    held = slice(total - few, total) if chooses and few and not scarce else None
    rest = slice(held.start if held else samples)
    found = Windows.of(
        ids_NL[rest],
        source,
        ids_NL[held].clone() if held else None,
        None if weights is None else weigh(weights[rest], ids_NL[rest], where),
        None if weights is None or held is None else weigh(weights[held], ids_NL[held], where),
    )
    found.scarce = source if scarce else None
    return found


def _tokens(source: str, texts: Iterator[str], tokenizer: Any, vocabulary: int, enough: int | None = None) -> Tensor:
    """Tokens of a source's texts, int64 [T]: built-in and wikitext joined by blank lines, other records by EOS. Of the
    latter no more records, or blocks of a large text, than `enough` tokens take."""
    pieces: list[Tensor] = []
    joiner = JOINER.get(source)
    found = _pieces(texts, tokenizer) if joiner is None else [_ids(tokenizer, joiner.join(texts))]
    count = 0
    for piece in found:
        pieces.append(piece)
        count += len(piece)
        if enough is not None and count >= enough:
            break
    tokens = torch.cat(pieces) if count else torch.empty(0, dtype=torch.int64)
    return within(tokens, vocabulary, f"{source}, tokenised") if count else tokens


def _pieces(texts: Iterator[str], tokenizer: Any) -> Iterator[Tensor]:
    """Tokens of record after record, of large ones block after block; EOS in front of all records but the first."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begun = False
    for text in texts:
        lead = eos if begun else []
        for block in blocks(text):
            ids = _ids(tokenizer, block, lead)
            begun, lead = begun or len(ids) > 0, []
            yield ids


def _ids(tokenizer: Any, text: str, lead: Sequence[int] = ()) -> Tensor:
    return torch.tensor([*lead, *tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.int64)
