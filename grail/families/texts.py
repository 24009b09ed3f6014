"""Which tokens of a text count: up to the one that is pooled. In a causal tower nothing behind it matters.

Shapes: B texts, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def up_to_the_end(ids: Tensor, end: int | None = None) -> Tensor:
    """bool [B, L]: the tokens of each text [B, L] up to the one that is pooled, the first `end`, or the first of the
    largest id; all of a text without one. Tokenizers may fill up with the end itself, so that no id tells what is
    padding."""
    ends = ids == (ids.amax(1, keepdim=True) if end is None else end)
    first = torch.where(ends.any(1), ends.int().argmax(1), ids.shape[1] - 1)
    return torch.arange(ids.shape[1], device=ids.device) <= first[:, None]


def and_one_more(ids: Tensor, padding: int) -> Tensor:
    """bool [B, L + 1] of ids [B, L]: what is no padding, and a token that the tower appends itself and pools."""
    return torch.cat([ids != padding, ids.new_ones(len(ids), 1, dtype=torch.bool)], 1)
