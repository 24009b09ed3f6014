"""The first of two passes, for an allocation over the whole network: what each site of the dense network can spare.

Shapes: U units of a site; T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from .chunks import Chunks, Texts
from .compensation import reconstruction_errors
from .error_allocation import ErrorCurve
from .families.base import Site
from .families.decoder import LOGIT_ROWS
from .job import Job
from .layer import LayerPass
from .result import SiteResult, from_main
from .selectors.base import BLOCK_GRADIENTS, PRODUCERS
from .sites import select_and_repair, view_of
from .statistics import GRAM, SiteStatistics
from .workspace import Workspace

Track = Callable[[Iterable[int]], Iterable[int]]
Raised = dict[str, tuple[float, float]]
"""By site, λ as asked and as used, where what was measured took more."""
SHARES = (0.1, 0.2, 0.35, 0.55, 0.8)
"""Shares of a site's channels (and of its heads, where there are many) at which its error is measured."""
HARMFUL = 1e-4
"""What an error below this costs cannot be told from nothing."""
FEW = 16
"""With so many units per group or fewer the error is measured at every number of them."""


def score_survey(
    job: Job, work: Workspace, texts: Texts, track: Track = lambda layers: layers
) -> tuple[dict[str, Tensor], Raised]:
    """Comparable unit scores [U] of every site of the dense network, by site name."""
    selector, scores, raised = job.selector, {}, {}
    needed = any(selector.needs_of(site.kind) - {PRODUCERS} for site in job.sites)
    chunks = Chunks.of(work, "survey", Texts(texts.windows, weights=texts.weights) if needed else Texts())
    _embed(job, chunks)
    for layer in track(range(job.model.layer_count)):
        run = LayerPass(job, layer, chunks, chunks.all if layer + 1 < job.model.layer_count else [])
        for site in run.sites:
            needs = selector.needs_of(site.kind) - {PRODUCERS, BLOCK_GRADIENTS}
            statistics = SiteStatistics(site.units.width, needs, device=job.model.device, affine=job.affine)
            if needed:
                run.pass_through(site, statistics)
            view = view_of(run, site, statistics)
            scores[site.name] = selector.global_scores(view).cpu()
            if view.damping is not None and view.damping.raised is not None:
                raised[site.name] = view.damping.raised
                if job.recipe.strict:
                    view.damping.refuse_raised(site.name)
        run.end()
        work.store.drop(chunks.series(layer), chunks.all)
    work.store.drop(chunks.series(job.model.layer_count), chunks.all)
    return scores, raised


def error_survey(
    job: Job, work: Workspace, texts: Texts, track: Track = lambda layers: layers
) -> tuple[dict[str, ErrorCurve], Raised]:
    """What compressing each site alone costs, by site name.

    The error that selection and repair leave (`compensation`) is measured at several widths. What it means for the
    network is measured at one, that of `job.kept` or the next that does harm: the trial windows go on from there
    through the dense layers, and the logits' Kullback-Leibler divergence from the dense ones is what that error costs.
    For small errors it is proportional to their energy, which gives the cost of the other widths.
    """
    job = replace(job, recipe=job.recipe.site_by_site())
    chunks = Chunks.of(work, "survey", texts)
    alone = Chunks(work, "survey-alone")
    origin: dict[int, tuple[str, int]] = {}
    curves: dict[str, ErrorCurve] = {}
    _embed(job, chunks)
    for layer in track(range(job.model.layer_count)):
        run = LayerPass(job, layer, chunks, chunks.all if layer + 1 < job.model.layer_count else chunks.trial)
        others = LayerPass(job, layer, alone, alone.counted)
        others.block = run.block
        for site in run.sites:
            if not job.changes(site):  # nothing is to go there
                others.pass_chunks(site, list(alone.counted))
                run.pass_through(site)
                others.note(run.part_of(site))
                continue
            statistics = SiteStatistics(
                site.units.width, job.statistics_of(site) | {GRAM}, device=job.model.device, affine=job.affine
            )
            if BLOCK_GRADIENTS in job.selector.needs_of(site.kind):
                run.gradient(site)  # while the layer's inputs are there
            run.pass_chunks(site, chunks.counted, statistics)
            statistics.sum_over(work.group)
            statistics.check_finite(site.name)
            others.pass_chunks(site, list(alone.counted))
            curves[site.name], result = _measured(run, site, statistics)
            for number in chunks.trial:
                copy = job.sites.index(site) * len(chunks.ids) + number  # no other process uses it
                origin[copy] = (site.name, number)
                _leave(run, others, site, result, number, copy)
            run.pass_chunks(site, chunks.trial)
            run.close(run.part_of(site))
            others.note(run.part_of(site))
        run.end()
        others.end()
        for part in (chunks, alone):
            work.store.drop(part.series(layer), part.all)
    found = _costs(job, chunks, alone, origin)
    for part in (chunks, alone):
        work.store.drop(part.series(job.model.layer_count), part.all)
    spared = {s.name: ErrorCurve({}, job.kept[s.name], 0.0) for s in job.sites if s.name not in curves}
    raised = {name: curve.raised for name, curve in curves.items() if curve.raised is not None}
    return spared | {name: replace(curve, cost=found[name]) for name, curve in curves.items()}, raised


def _embed(job: Job, chunks: Chunks) -> None:
    for number in chunks.all:
        chunks.work.store.put(chunks.series(0), number, job.model.embed(chunks.ids[number]))


def _measured(run: LayerPass, site: Site, statistics: SiteStatistics) -> tuple[ErrorCurve, SiteResult]:
    """Errors by units kept per group, without their cost, and what is done at the width where it will be measured."""
    view = view_of(run, site, statistics)
    per_group, settled = site.units.per_group, run.job.kept[site.name]

    def at(kept: int) -> tuple[float, SiteResult]:
        result = select_and_repair(run, site, replace(view, kept=kept))
        result.check(strict=run.job.recipe.strict)
        raised.extend([result.raised] if result.raised else [])
        done = result.compensation
        if done is not None:
            return done.error_after, result
        return reconstruction_errors(view.weight_OH, [result.weight], result.reduction, view.matrix)[0], result

    def chosen() -> SiteResult:
        error, result = at(settled)
        errors = {kept: at(kept)[0] for kept in _widths(per_group) if kept != settled} | {settled: error}
        harmful = max((kept for kept, e in errors.items() if kept <= settled and e >= HARMFUL), default=min(errors))
        curve.append(ErrorCurve(errors, harmful, 0.0, max(raised, key=lambda pair: pair[1], default=None)))
        return result if harmful == settled else at(harmful)[1]

    curve: list[ErrorCurve] = []
    raised: list[tuple[float, float]] = []
    result = from_main(run.work.group, site, chosen)
    return run.work.group.broadcast(curve)[0], result


def _widths(per_group: int) -> list[int]:
    """Numbers of kept units at which errors are measured."""
    if per_group <= FEW:
        return list(range(1, per_group))
    return [min(max(round(per_group * (1 - share)), 1), per_group - 1) for share in SHARES]


def _leave(run: LayerPass, others: LayerPass, site: Site, result: SiteResult, number: int, copy: int) -> None:
    """A copy of a chunk's stream in which this site alone is compressed: it goes on among the others."""
    store, chunks = run.work.store, others.chunks
    store.put(chunks.series(run.layer), copy, run.state(number))
    for part in run.known:
        others.put(part, copy, run.take(part, number))
    z_BLK = result.reduction.reduce(run.hidden(site, number))
    chunks.counted.append(copy)
    weight_OK, bias_O = (None if t is None else run.computed(t) for t in (result.weight, result.bias))
    others.consume(site, copy, z_BLK, weight_OK, bias_O)


@torch.no_grad()
def _costs(job: Job, chunks: Chunks, alone: Chunks, origin: dict[int, tuple[str, int]]) -> dict[str, float]:
    """Mean Kullback-Leibler divergence per token of the copies' logits from the dense ones, by site name."""
    work, last, tail = chunks.work, job.model.layer_count, job.model.tail()
    sums = torch.zeros(len(job.sites) + 1, dtype=torch.float64)
    names = [site.name for site in job.sites]
    for number in chunks.trial:
        dense_BLD = work.store.get(chunks.series(last), number, job.model.device)
        copies = [copy for copy, (_, of) in origin.items() if of == number]
        sums[-1] += dense_BLD.shape[0] * dense_BLD.shape[1]
        for rows in range(0, dense_BLD.flatten(0, 1).shape[0], LOGIT_ROWS):
            part = slice(rows, rows + LOGIT_ROWS)
            dense_TV = log_softmax(tail(dense_BLD.flatten(0, 1)[part]), -1)
            for copy in copies:
                copy_BLD = work.store.get(alone.series(last), copy, job.model.device)
                copy_TV = log_softmax(tail(copy_BLD.flatten(0, 1)[part]), -1)
                lost = kl_div(copy_TV, dense_TV, reduction="sum", log_target=True).item()
                sums[names.index(origin[copy][0])] += lost
    sums = work.group.sum_(sums)
    return {name: max((sums[i] / sums[-1]).item(), 0.0) for i, name in enumerate(names)}
