"""How many tokens a window has, and how many a model was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .mixture import TOKENISED, parts_of
from .sources import BUILTIN
from .tokens import stored_length

BUILTIN_LENGTH, DEFAULT_LENGTH, SHORTEST = 512, 2048, 2


def default_length(source: Any, longest: int | None = None) -> int:
    """Tokens of a window where --seq-len is not given; of a mixture the least of its parts. longest: how many the model
    was made for."""
    least = min(map(_length_of, parts_of(source) if isinstance(source, str) else [None]))
    return min(least, max(longest or least, SHORTEST))


def _length_of(part: str | None) -> int:
    if part is not None and part.endswith(TOKENISED):
        return stored_length(Path(part)) or DEFAULT_LENGTH
    return BUILTIN_LENGTH if part in BUILTIN else DEFAULT_LENGTH


def longest_of(config: Any) -> int | None:
    """Positions that a model of this configuration was made for; None where it does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def beyond_positions(length: int, config: Any) -> str | None:
    """What is to be said of windows of so many tokens that are longer than a model was made for."""
    longest = longest_of(config)
    if not longest or length <= longest:
        return None
    return (
        f"windows of {length} tokens, and the model was made for {longest} positions (max_position_embeddings): what "
        f"it computes behind them means little; take a smaller --seq-len"
    )
