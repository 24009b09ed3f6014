"""The dense network beside the compressed one, layer by layer: what the residual stream should be after each site.

Shapes: B windows, L tokens, D hidden size. The layer that is being compressed is run on both streams before its tensors
are replaced, so that it is read once.
"""

from __future__ import annotations

from torch import Tensor

from .chunks import Chunks
from .families.base import Site
from .layer import LayerPass
from .trials import importance

TARGET, WEIGHT = "target", "weight"


def beside(chunks: Chunks) -> Chunks:
    """The dense stream's chunks: those of the compressed one, without the probe."""
    return chunks.beside(f"{chunks.name}-dense")


class Twin:
    """The dense stream through one layer; `run` is the layer's pass over the compressed one."""

    def __init__(self, run: LayerPass):
        self.run = run
        chunks = beside(run.chunks)
        self.dense = LayerPass(run.job, run.layer, chunks, chunks.all)
        self.dense.block = run.block

    @property
    def numbers(self) -> list[int]:
        return self.dense.chunks.all

    def pass_through(self, site: Site) -> None:
        """Compute the site's branch of the dense stream, and nothing of the difference."""
        self.dense.pass_chunks(site, self.numbers)
        self.dense.note(self.run.part_of(site))

    def target(self, site: Site, number: int, *, keep: bool = False) -> Tensor:
        """The same for a chunk. Returns what the site's consumer would have to add to the compressed stream to arrive
        at the dense one after it: t = r_d − r_c, float32 [B, L, D]. Of the chunks that decide between candidates, or
        with `keep`, it is stored as the run's series `target`; of the first also, as `weight`, how much each token
        counts (trials.importance), float32 [B, L]."""
        dense_BLD, compressed_BLD = self.dense.through(site, number).float(), self.run.stream(number).float()
        target_BLD = dense_BLD - compressed_BLD
        decides = number in self.run.chunks.trial
        if keep or decides:
            self.run.put(TARGET, number, target_BLD)
        if decides:
            self.run.put(WEIGHT, number, importance(dense_BLD, compressed_BLD))
        return target_BLD

    def targets(self, site: Site) -> None:
        """The targets of all chunks, stored."""
        for number in self.numbers:
            self.target(site, number, keep=True)

    def passed(self, site: Site) -> None:
        """All chunks have passed the site."""
        self.dense.note(self.run.part_of(site))

    def output(self, number: int) -> Tensor:
        """A chunk's dense stream after the layer."""
        return self.dense.out(number)

    def close(self) -> None:
        """A site is done: its targets are given up."""
        for series in (TARGET, WEIGHT):
            self.run.drop(series)

    def end(self) -> tuple[str, list[int]]:
        """The layer is done. Returns the series and numbers that can go once it is committed."""
        self.dense.end()
        return self.dense.chunks.series(self.run.layer), list(self.numbers)
