"""How a pass over a model is carried out: which windows this process has, where activations lie, what the clock says.

What is computed does not depend on anything here, except on how windows are put into chunks and on how many processes
share them (sums are rounded in another order).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .distributed import Group
from .profile import Profile
from .store import ChunkStore, MemoryStore

CHUNK_TOKENS = 4096
CHUNK_BYTES, ALIVE = 2**28, 3
"""A chunk's largest activations take about so many bytes, as so many tensors at a time."""


def chunk_tokens(widest: int, itemsize: int) -> int:
    """Tokens that go through a layer at once, when its widest hidden vector has so many channels."""
    return max(min(CHUNK_BYTES // (ALIVE * itemsize * widest), CHUNK_TOKENS), 1)


@dataclass
class Workspace:
    """store: where chunks lie; chunk_tokens: how many tokens a chunk has at most (at least one window); spill: whether
    the input of a consumer is stored until its new weight is known, or computed a second time; ahead: whether the next
    layer is read, and the last one written, in the background."""

    store: ChunkStore = field(default_factory=MemoryStore)
    group: Group = field(default_factory=Group.solo)
    chunk_tokens: int = CHUNK_TOKENS
    spill: bool = True
    ahead: bool = True
    profile: Profile = field(default_factory=Profile)

    def split(self, windows_NL: Tensor) -> list[Tensor]:
        """All windows in chunks; a chunk's number in this list is its number everywhere."""
        return list(windows_NL.split(max(self.chunk_tokens // windows_NL.shape[1], 1)))

    def mine(self, chunks: int) -> list[int]:
        """The numbers of the chunks that this process computes."""
        return list(self.group.share(chunks))
