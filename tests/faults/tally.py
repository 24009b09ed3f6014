"""How many faults were tried, and what came of them."""

from __future__ import annotations

from collections import Counter

counted: Counter[tuple[str, str]] = Counter()


def count(kind: str, outcome: str) -> None:
    counted[kind, outcome] += 1
