"""One layer on its way through the pipeline, and what happens at one of its sites: gather, select, compensate.

Shapes: B windows, L tokens, D hidden size, H a site's width, K what is kept of it, O outputs of its consumer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .compensation import Compensation, compensate, compensate_pairs, mean_bias
from .errors import GrailError
from .families.base import Site
from .families.decoder import LAYERS, Block
from .job import Job
from .moments import PairStatistics
from .reduction import Folding, Reduction
from .regional import block_gradients
from .selectors import SiteView
from .selectors.base import BLOCK_GRADIENTS, PRODUCERS
from .statistics import SiteStatistics


@dataclass
class SiteResult:
    """What was done at one site; `compensation` is None when it was only pruned, both None when nothing was removed;
    `weight` [O, K] and `bias` [O] (or None) are the consumer's new ones."""

    site: Site
    reduction: Reduction | None = None
    compensation: Compensation | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class LayerPass:
    """A layer with the stream of every chunk and the branches that are already known. The first `counted` chunks enter
    the statistics; the others (the probe) only pass through."""

    def __init__(self, job: Job, layer: int, states: list[Tensor], counted: int):
        self.job, self.layer, self.states, self.counted = job, layer, states, counted
        self.known: list[dict[str, Tensor]] = [{} for _ in states]
        self.prefix = f"{LAYERS}{layer}."
        self._gradients: dict[str, Tensor] | None = None

    @cached_property
    def block(self) -> Block:
        """The layer itself, read when it is first run."""
        return self.job.model.block(self.layer)

    @property
    def sites(self) -> list[Site]:
        """The layer's sites in execution order."""
        return [site for site in self.job.sites if site.layer == self.layer]

    def pass_through(self, site: Site, statistics: SiteStatistics | None = None) -> None:
        """Compute the site's branch with its weights as they are; count its hidden vectors on the way."""
        part = self.job.model.part_of(site)
        for i, (x_BLD, branches) in enumerate(zip(self.states, self.known, strict=True)):
            h_BLH = self.block.hidden(part, x_BLD, branches)
            if statistics is not None and i < self.counted:
                statistics.update(h_BLH)
            branches[part] = self.block.consume(part, h_BLH)

    def compress(self, site: Site) -> SiteResult:
        """Select and compensate one site, and compute its branch from the result."""
        part, job = self.job.model.part_of(site), self.job
        needs = job.statistics_of(site)
        statistics = SiteStatistics(site.units.width, needs, device=job.model.device, affine=job.affine)
        hidden: list[Tensor | None] = []
        for i, (x_BLD, branches) in enumerate(zip(self.states, self.known, strict=True)):
            h_BLH = self.block.hidden(part, x_BLD, branches)
            if i < self.counted and needs:
                statistics.update(h_BLH)
            hidden.append(h_BLH)
        if needs:
            statistics.check_finite(site.name)
        view = self.view(site, statistics)
        reduction = job.selector.select(view)
        if isinstance(reduction, Folding):
            result = self._fold(site, part, view, reduction, hidden)
            compressed = _taken(hidden)
        else:
            result = self._repair(site, view, reduction, statistics)
            compressed = map(reduction.reduce, _taken(hidden))
        for branches, z_BLK in zip(self.known, compressed, strict=True):
            branches[part] = self.block.consume(part, z_BLK, result.weight, result.bias)
        return result

    def view(self, site: Site, statistics: SiteStatistics) -> SiteView:
        """What the selector may look at."""
        job = self.job
        needs = job.selector.needs_of(site.kind)
        return SiteView(
            name=site.name,
            kind=site.kind,
            units=site.units,
            weight_OH=job.consumer_weight(site),
            producers=job.producer_rows(site) if PRODUCERS in needs else {},
            statistics=statistics,
            kept=job.kept[site.name],
            seed=job.recipe.seed,
            gradients_OH=self._gradient(site) if BLOCK_GRADIENTS in needs else None,
            windows=sum(len(x_BLD) for x_BLD in self.states[: self.counted]),
            affine=job.affine,
        )

    def outputs(self) -> list[Tensor]:
        """Each chunk's stream after the layer, all branches known. Raises GrailError when one is not finite."""
        for i, branches in enumerate(self.known):
            self.states[i] = self.block.output(self.states[i], branches)
            check_finite(self.states[i], self.layer)
        return self.states

    def _gradient(self, site: Site) -> Tensor:
        """Gradients of the dense block, of all its consumers at once, when they are first asked for."""
        if self._gradients is None:
            names = [self._local(f"{s.consumer}.weight") for s in self.sites]
            chunks = self.states[: self.counted]
            self._gradients = block_gradients(self.block.apply, self.block.tensors(), names, chunks)
        return self._gradients[self._local(f"{site.consumer}.weight")]

    def _local(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _repair(self, site: Site, view: SiteView, reduction: Reduction, statistics: SiteStatistics) -> SiteResult:
        """New consumer of a reduction whose compressed vector follows from the dense one: z = R h."""
        job, recipe = self.job, self.job.recipe
        dtype = job.written_dtype(view.weight_OH.dtype)
        lam = job.selector.own_ridge(view)
        compensation, bias_O = None, None
        if recipe.compensate or lam is not None:
            options = {"name": site.name, "dtype": dtype}
            if not recipe.compensate:
                options |= {"lam": lam}
            else:
                options |= {"ridge": recipe.ridge, "form": recipe.ridge_form}
            compensation = compensate(view.weight_OH, view.matrix, reduction, **options)
            weight_OK = compensation.weight
        else:
            weight_OK = reduction.lift_consumer(view.weight_OH).to(dtype)
        if job.affine:
            bias_O = mean_bias(view.weight_OH, weight_OK, reduction, statistics, job.consumer_bias(site)).to(dtype)
        return SiteResult(site, reduction, compensation, weight_OK, bias_O)

    def _fold(
        self, site: Site, part: str, view: SiteView, reduction: Reduction, hidden: list[Tensor | None]
    ) -> SiteResult:
        """New consumer of a folding. What the narrowed producers emit is not R h, since averaging does not commute
        with the non-linearity between: a second forward gives it. `hidden` is replaced by it, chunk by chunk."""
        job, recipe = self.job, self.job.recipe
        dtype = job.written_dtype(view.weight_OH.dtype)
        lifted_OK = reduction.lift_consumer(view.weight_OH.double()).to(dtype)
        narrow = {self._local(name): t for name, t in job.narrow_producers(site, reduction).items()}
        fit = recipe.compensate or job.affine
        pairs = PairStatistics(reduction.kept_width, len(lifted_OK), device=job.model.device, affine=job.affine)
        dense_OH, anchor_OK = view.weight_OH.float(), lifted_OK.float()
        with self.block.with_tensors(narrow):
            for i, (x_BLD, branches) in enumerate(zip(self.states, self.known, strict=True)):
                z_BLK = self.block.hidden(part, x_BLD, branches)
                if not torch.isfinite(z_BLK).all():
                    raise GrailError(
                        f"{site.name}: the folded channels carry NaN or infinite activations; check the checkpoint, or "
                        f"use --dtype float32 where a narrower one overflows"
                    )
                if fit and i < self.counted:
                    target_BLO = hidden[i].float() @ dense_OH.mT
                    pairs.update(z_BLK, target_BLO, target_BLO - z_BLK.float() @ anchor_OK.mT)
                hidden[i] = z_BLK
        if recipe.compensate:
            options = {"ridge": recipe.ridge, "form": recipe.ridge_form, "name": site.name, "dtype": dtype}
            found = compensate_pairs(lifted_OK, pairs, **options)
            return SiteResult(site, reduction, found, found.weight, self._with_own_bias(site, found.bias, dtype))
        bias_O = pairs.mean_difference if job.affine else None
        return SiteResult(site, reduction, None, lifted_OK, self._with_own_bias(site, bias_O, dtype))

    def _with_own_bias(self, site: Site, added_O: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        own_O = self.job.consumer_bias(site)
        if added_O is None:
            return None
        return (added_O if own_O is None else added_O + own_O.double()).to(dtype)


def _taken(chunks: list[Tensor | None]) -> Iterator[Tensor]:
    """Each chunk in turn, given up as it goes, so that two forms of all of them are never held."""
    for i, chunk in enumerate(chunks):
        chunks[i] = None
        yield chunk


def check_finite(x_BLD: Tensor, layer: int) -> None:
    """Raise GrailError naming the layer when its output overflowed."""
    if not torch.isfinite(x_BLD).all():
        raise GrailError(
            f"{LAYERS}{layer}: its output holds NaN or infinity; check the checkpoint, or use --dtype float32 "
            f"where a narrower one overflows"
        )


def without_working_tensors(result: SiteResult) -> SiteResult:
    """What the report needs: the new weights are on disk by then."""
    compensation = result.compensation and replace(result.compensation, weight=None, bias=None)
    return replace(result, weight=None, bias=None, compensation=compensation)
