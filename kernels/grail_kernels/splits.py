"""How often the rows of a Gram matrix or cross moment are split, so that the programs fill a GPU.

A GPU runs as many programs at once as it has multiprocessors (one of ours fits on each), and a last wave that is half
empty takes as long as a full one: 78 tiles split in two are 156 programs, for which 132 multiprocessors need two waves
as if they were 264. More splits fill the waves better, and cost a workspace that is written and read once more.
"""

from __future__ import annotations

import functools

LEAST_ROWS = 512
"""Of one split."""
MOST_WAVES = 8
REDUCED = 1000
"""Rows that a tile could be multiplied in while one tile of workspace is written and read again: on an H100 128 x 128
products at 650 TFLOP/s over the whole device, 128 KB at 2.5 TB/s."""
WORTH = 1.05
"""The least gain that more splits, and so more memory, are taken for."""


@functools.lru_cache(maxsize=4096)
def choose_splits(tiles: int, rows: int, units: int, phases: int = 1) -> int:
    """Into how many parts `rows` rows go: tiles, the programs of one part; units, the multiprocessors; phases, the
    products that one row takes (3 for float32 in two bf16 parts). The same numbers give the same splits, so the same
    bits."""
    most = max(min(rows // LEAST_ROWS, -(-MOST_WAVES * units // tiles)), 1)
    costs = [_cost(tiles, rows, units, phases, splits) for splits in range(1, most + 1)]
    return next(splits for splits, cost in enumerate(costs, 1) if cost <= WORTH * min(costs))


def _cost(tiles: int, rows: int, units: int, phases: int, splits: int) -> float:
    """In rows that one multiprocessor multiplies."""
    waves = -(-tiles * splits // units)
    reduced = REDUCED * splits * tiles / units if splits > 1 else 0.0
    return waves * -(-rows // splits) * phases + reduced
