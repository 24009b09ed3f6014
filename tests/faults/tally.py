"""How many cases were tried, by kind, and how they ended: the line that pytest shows at its end."""

from __future__ import annotations

import os
from collections import Counter

MANY = float(os.environ.get("GRAIL_FAULTS", "1"))
"""By which the number of cases of every kind is multiplied, for longer runs."""
_seen: Counter[tuple[str, str]] = Counter()


def count(kind: str, outcome: str) -> None:
    """One case more; outcome: "refused", "accepted and right", or a word of one's own."""
    _seen[kind, outcome] += 1


def counted() -> list[tuple[str, str, int]]:
    """(kind, outcome, cases) so far, in what one process can tell another."""
    return [(*key, number) for key, number in _seen.items()]


def add(others: list[tuple[str, str, int]]) -> None:
    """What another process counted."""
    for kind, outcome, number in others:
        _seen[kind, outcome] += number


def times(number: int) -> int:
    """So many cases, multiplied by GRAIL_FAULTS."""
    return max(1, round(number * MANY))


def line() -> str | None:
    """All of it in one line; None where nothing was counted."""
    if not _seen:
        return None
    kinds, outcomes = Counter(), Counter()
    for (kind, outcome), number in _seen.items():
        kinds[kind] += number
        outcomes[outcome] += number
    told = [f"{name} {number:,}" for found in (kinds, outcomes) for name, number in found.most_common()]
    return f"faults: {sum(kinds.values()):,} cases: {', '.join(told)}"
