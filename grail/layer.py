"""One layer on its way through a pass: chunk by chunk, each expensive part run once, one chunk in memory at a time.

Shapes: B windows, L tokens, D hidden size, H a site's width, O outputs of its consumer. A chunk's hidden states
x [B, L, D], the outputs of the branches that are known, and the input of a consumer between its two uses lie in the
workspace's store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

from torch import Tensor

from grail_kernels.inputs import all_finite

from .chunks import Chunks
from .errors import GrailError
from .families.base import Site
from .families.decoder import LAYERS, Block
from .job import Job
from .machine import trim_memory
from .regional import gradient_squares
from .statistics import GRAM, SiteStatistics

HIDDEN = "hidden"


class LayerPass:
    """A layer and what is known of it. `wanted`: the chunks whose output is asked for; with `trained` a training step
    computes it once the sites are done."""

    def __init__(self, job: Job, layer: int, chunks: Chunks, wanted: list[int]):
        self.job, self.layer, self.chunks, self.wanted = job, layer, chunks, wanted
        self.trained = False
        self.work, self.device = chunks.work, job.model.device
        self.prefix = job.model.prefix(layer)
        self._known: list[str] = []
        self._gradients: dict[str, Tensor] | None = None

    @cached_property
    def block(self) -> Block:
        """The layer itself, read as it is run."""
        return self.job.model.block(self.layer)

    @cached_property
    def sites(self) -> list[Site]:
        """The layer's sites in execution order."""
        return [site for site in self.job.sites if site.layer == self.layer]

    def part_of(self, site: Site) -> str:
        """The residual branch a site lies in."""
        return self.job.model.part_of(site)

    def local(self, name: str) -> str:
        """A tensor's name within the layer."""
        return name.removeprefix(self.prefix)

    def computed(self, tensor: Tensor) -> Tensor:
        """A tensor in the compute dtype, on the compute device."""
        return tensor.to(self.device, self.job.model.dtype)

    def pass_through(self, site: Site, statistics: SiteStatistics | None = None) -> None:
        """Compute the site's branch with its weights as they are; count its hidden vectors on the way."""
        self.pass_chunks(site, self.chunks.all, statistics)
        if statistics is not None:
            statistics.sum_over(self.work.group)
        self.close(self.part_of(site))

    def pass_chunks(self, site: Site, numbers: list[int], statistics: SiteStatistics | None = None) -> None:
        """The same for some chunks, of which those that are counted enter the statistics of this process; the branch
        stays open."""
        for number in numbers:
            counts = statistics is not None and number in self.chunks.counted
            goes_on = self.goes_on(number, site)
            if counts or goes_on:
                h_BLH = self.hidden(site, number)
            if counts:
                self._count(statistics, self.chunks.weighed(number, h_BLH))
                statistics.check_finite(site.name)
            if goes_on:
                self.consume(site, number, h_BLH)
            h_BLH = None  # or it would lie beside what the next chunk needs

    def through(self, site: Site, number: int) -> Tensor:
        """A chunk's residual stream [B, L, D] after the site's branch, with the weights as they are. The branch, or for
        the last one the layer's output, is stored as `consume` does. Raises GrailError when it is not finite."""
        part, x_BLD, known = self.part_of(site), self.state(number), self._branches(number)
        tokens = x_BLD.shape[0] * x_BLD.shape[1]
        flops = 2 * tokens * (self._before_consumer(site) + site.units.width * x_BLD.shape[-1])
        with self.work.profile.phase("forward", flops=flops):
            known[part] = self.block.consume(part, self.block.hidden(part, x_BLD, known))
            last = site == self.sites[-1]
            after_BLD = self.block.output(x_BLD, known) if last else self.block.stream(x_BLD, known)
        what = f"{site.name}: the residual stream after it"
        if last:
            self.finish(number, after_BLD, what)
        else:
            _check_finite(after_BLD, what)
            self.put(part, number, known[part])
        return after_BLD

    def gather(
        self,
        site: Site,
        keep_counted: bool,
        also: Callable[[SiteStatistics, int, Tensor], None] | None = None,
        before: Callable[[int], None] | None = None,
    ) -> SiteStatistics:
        """The statistics of a site, over all processes. Where inputs of consumers are spilled, those that will be
        needed again are put into the store; keep_counted: those of all counted chunks will. also: called with each
        counted chunk's number and hidden vectors, weighed, once the statistics, of this process so far, hold them;
        before: with each chunk's number before anything of it is computed."""
        needs = self.job.statistics_of(site)
        statistics = SiteStatistics(site.units.width, needs, device=self.device, affine=self.job.affine)
        self._trim()
        for number in self.chunks.all:
            if before is not None:
                before(number)
            counts = number in self.chunks.counted
            again = (keep_counted and counts) or number in self.chunks.trial or self.goes_on(number, site)
            keeps = self.work.spill and again
            if not keeps and not (counts and needs):
                continue
            h_BLH = self.hidden(site, number)
            if counts and needs:
                weighed_BLH = self.chunks.weighed(number, h_BLH)
                self._count(statistics, weighed_BLH)
                if also is not None:
                    also(statistics, number, weighed_BLH)
                weighed_BLH = None
            if keeps:
                self.put(HIDDEN, number, h_BLH)
            del h_BLH  # or it would lie beside what the next chunk needs
        if self.work.spill:
            self.block.release(self.part_of(site))
        if needs:
            statistics.sum_over(self.work.group)
            statistics.check_finite(site.name)
        self._trim()  # selection and repair come next
        return statistics

    def goes_on(self, number: int, site: Site) -> bool:
        """Whether a chunk's output of the site's branch will be needed."""
        return site != self.sites[-1] or (number in self.wanted and not self.trained)

    def state(self, number: int) -> Tensor:
        """A chunk's hidden states before the layer."""
        return self._take(self.chunks.series(self.layer), number)

    def out(self, number: int) -> Tensor:
        """A chunk's hidden states after the layer."""
        return self._take(self.chunks.series(self.layer + 1), number)

    def hidden(self, site: Site, number: int) -> Tensor:
        """The site's hidden vectors of a chunk, computed from the layer's input."""
        x_BLD, known = self.state(number), self._branches(number)
        tokens = x_BLD.shape[0] * x_BLD.shape[1]
        with self.work.profile.phase("forward", flops=2 * tokens * self._before_consumer(site)):
            return self.block.hidden(self.part_of(site), x_BLD, known)

    def hidden_again(self, site: Site, number: int) -> Tensor:
        """The same for a second time: what was spilled, or computed anew."""
        return self._take(self._named(HIDDEN), number) if self.work.spill else self.hidden(site, number)

    def put(self, series: str, number: int, tensor: Tensor) -> None:
        """Store a chunk of this pass."""
        self._put(self._named(series), number, tensor)

    def take(self, series: str, number: int) -> Tensor:
        """A chunk that was put."""
        return self._take(self._named(series), number)

    def drop(self, series: str) -> None:
        """Give up what was put."""
        self.work.store.drop(self._named(series), self.chunks.all)

    def stream(self, number: int) -> Tensor:
        """A chunk's residual stream [B, L, D] after the branches that are known."""
        with self.work.profile.phase("forward"):
            return self.block.stream(self.state(number), self._branches(number))

    def consume(
        self, site: Site, number: int, h: Tensor, weight_OK: Tensor | None = None, bias_O: Tensor | None = None
    ) -> None:
        """A chunk's output of the site's branch, from its consumer's input: stored, or for the last branch the layer's
        output made of it and stored. Raises GrailError when that is not finite."""
        part = self.part_of(site)
        with self.work.profile.phase("forward", flops=2 * h.numel() * self.job.model.config.hidden_size):
            y_BLD = self.block.consume(part, h, weight_OK, bias_O)
        self.work.store.drop(self._named(HIDDEN), [number])
        if site != self.sites[-1]:
            self.put(part, number, y_BLD)
            return
        with self.work.profile.phase("forward"):
            out_BLD = self.block.output(self.state(number), self._branches(number) | {part: y_BLD})
        self.finish(number, out_BLD)

    def finish(self, number: int, out_BLD: Tensor, what: str | None = None) -> None:
        """Store a chunk's hidden states after the layer. Raises GrailError, about `what`, when they are not finite."""
        _check_finite(out_BLD, what or f"{LAYERS}{self.layer}: its output")
        self._put(self.chunks.series(self.layer + 1), number, out_BLD, lasting=self.chunks.lasting)
        self.work.store.spare(self.chunks.series(self.layer), [number])

    def close(self, part: str) -> None:
        """A branch is done: its weights and the spilled inputs of its consumer are given up."""
        self.block.release(part)
        self.work.store.drop(self._named(HIDDEN), self.chunks.all)
        self.note(part)

    @property
    def known(self) -> list[str]:
        """Branches whose outputs are known."""
        return list(self._known)

    def note(self, part: str) -> None:
        """The outputs of a branch are known from here on."""
        self._known.append(part)

    def end(self) -> None:
        """The layer is done: the outputs of its branches are given up."""
        for part in self._known:
            self.work.store.drop(self._named(part), self.chunks.all)
        self._trim()

    def _trim(self) -> None:
        trim_memory(sum(self._numel.values()))

    @cached_property
    def _numel(self) -> dict[str, int]:
        """Numbers of each of the layer's tensors, by the name within the layer."""
        source = self.job.model.source
        return {
            self.local(name): math.prod(source.info(name).shape)
            for name in source.names()
            if name.startswith(self.prefix)
        }

    def _before_consumer(self, site: Site) -> int:
        """Numbers of the weights that a token meets in the site's branch up to its consumer."""
        part, consumer = f"{self.part_of(site)}.", f"{self.local(site.consumer)}."
        return sum(n for name, n in self._numel.items() if name.startswith(part) and not name.startswith(consumer))

    def gradient(self, site: Site) -> Tensor:
        """RMS over all windows of the dense block's regional gradient for the site's consumer (Wanda++), float32
        [O, H]. Those of all consumers are computed when the first is asked for."""
        if self._gradients is None:
            names = [self.local(f"{s.consumer}.weight") for s in self.sites]
            with self.work.profile.phase("gradients"):
                squares = gradient_squares(self.block.apply, self.block.tensors(), names, self._counted_states())
            for total in squares.values():
                self.work.group.sum_(total)
            self._gradients = {name: (total / self.chunks.windows).sqrt() for name, total in squares.items()}
        return self._gradients[self.local(f"{site.consumer}.weight")]

    def _counted_states(self) -> Iterator[Tensor]:
        return map(self.state, self.chunks.counted)

    def _count(self, statistics: SiteStatistics, h_BLH: Tensor) -> None:
        gram = GRAM in statistics.needs
        flops = h_BLH.numel() * (statistics.width + 1 if gram else 2)
        with self.work.profile.phase("gram" if gram else "moments", flops=flops):
            statistics.update(h_BLH)

    def _branches(self, number: int) -> dict[str, Tensor]:
        return {part: self._take(self._named(part), number) for part in self._known}

    def _named(self, series: str) -> str:
        return f"{self.chunks.name}-{series}"

    def _take(self, series: str, number: int) -> Tensor:
        with self.work.profile.phase("store") as phase:
            found = self.work.store.get(series, number, self.device)
            phase.bytes += found.nbytes
        return found

    def _put(self, series: str, number: int, tensor: Tensor, *, lasting: bool = False) -> None:
        with self.work.profile.phase("store", bytes=tensor.nbytes):
            self.work.store.put(series, number, tensor, lasting=lasting)


def _check_finite(states_BLD: Tensor, what: str) -> None:
    if not all_finite(states_BLD):
        raise GrailError(
            f"{what} holds NaN or infinity; check the checkpoint, or use --dtype float32 where a narrower one overflows"
        )
