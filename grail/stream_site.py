"""What happens at one site with --target stream: the dense network runs beside, and the consumer's new weight also
makes up for what all sites before it got wrong (stream_repair.py), as far as held-out windows say that it pays
(trials.py).

Shapes: H a site's width, K what is kept of it, O outputs of its consumer; B windows, L tokens, T of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .families.base import Site
from .layer import HIDDEN, LayerPass
from .moments import CrossMoments, PairStatistics, dot
from .reduction import Selection
from .result import SiteResult, from_main
from .selectors import SiteView
from .sites import apply, folded, narrowed_producers, select, view_of
from .statistics import SiteStatistics
from .stream_choice import Prepared, repair
from .stream_repair import StreamSystem, pair_errors, selection_errors
from .twin import TARGET, Twin


def compress(run: LayerPass, twin: Twin, site: Site) -> SiteResult:
    """Select and repair one site towards the dense stream, and compute its branch from the result."""
    folds = run.job.selector.folds(site.kind) and run.job.changes(site)
    prepared = _fold(run, twin, site) if folds else _prune(run, twin, site)
    result = repair(run, site, prepared)
    result.check(strict=run.job.recipe.strict)
    apply(run, site, result, prepared.narrow if folds else None)
    twin.close()
    return result


def _prune(run: LayerPass, twin: Twin, site: Site) -> Prepared:
    """Gather G and M in one pass, in which the dense stream goes on too, then select."""
    job, group = run.job, run.work.group
    moments: list[CrossMoments] = []
    targets: dict[int, Tensor] = {}

    def before(number: int) -> None:
        target_BLO = twin.target(site, number) if number in twin.numbers else None
        if number in run.chunks.counted:
            targets[number] = target_BLO

    def count(statistics: SiteStatistics, number: int, h_BLH: Tensor) -> None:
        if not moments:
            moments.append(CrossMoments(statistics.accumulator, _outputs(run, site), affine=job.affine))
        target_BLO = targets.pop(number)
        both = (run.chunks.weighed(number, t) for t in (target_BLO, _less_own_bias(run, site, target_BLO)))
        with run.work.profile.phase("cross moment", flops=2 * h_BLH.numel() * target_BLO.shape[-1]):
            moments[0].update(h_BLH, *both)

    statistics = run.gather(site, keep_counted=False, also=count, before=before)
    twin.passed(site)
    stream = moments[0] if moments else CrossMoments(statistics.accumulator, _outputs(run, site), affine=job.affine)
    stream.sum_over(group)
    view = view_of(run, site, statistics)
    chosen = _selection(run, site, view)
    reduction, weight_OH, gram = chosen.reduction, view.weight_OH, view.matrix
    with run.work.profile.phase("solve"):
        stream.minus_(weight_OH, gram)
    found = Prepared(
        reduction,
        reduction.lift_consumer(weight_OH),
        StreamSystem.of_selection(weight_OH, gram, stream.cross, reduction, form=job.recipe.ridge_form, name=site.name),
        lambda number: reduction.reduce(run.hidden_again(site, number)),
        lambda candidates: selection_errors(weight_OH, candidates, reduction, gram, stream),
        damping=chosen.damping,
    )
    if job.affine:
        mean_H = statistics.mean()
        found.base = _plus_own_bias(run, site, weight_OH.double() @ mean_H)
        found.mean, found.mean_difference = reduction.reduce(mean_H), stream.mean_difference
    return found


def _selection(run: LayerPass, site: Site, view: SiteView) -> SiteResult:
    """What the main process chooses; everything, where nothing is to be removed."""
    units = site.units
    if not run.job.changes(site):
        return SiteResult(site, Selection(torch.arange(units.count), units.size, units.width))
    return from_main(run.work.group, site, lambda: SiteResult(site, select(run, view), damping=view.damping))


def _fold(run: LayerPass, twin: Twin, site: Site) -> Prepared:
    """Gather and select; then a second forward, since the narrowed producers do not emit R h."""
    job, group = run.job, run.work.group
    twin.targets(site)
    twin.passed(site)
    view = view_of(run, site, run.gather(site, keep_counted=True))
    chosen = _selection(run, site, view)
    reduction = chosen.reduction
    narrow = narrowed_producers(run, site, reduction)
    lifted_OK = reduction.lift_consumer(view.weight_OH.double()).to(job.written_dtype(view.weight_OH.dtype))
    anchor_OK = lifted_OK.float()
    pairs = PairStatistics(reduction.kept_width, len(anchor_OK), device=run.device, affine=job.affine)
    stream = CrossMoments(pairs.accumulator, len(anchor_OK), affine=job.affine)
    mixed = 0.0
    for number in run.chunks.all:
        counts = number in run.chunks.counted
        if not (counts or number in run.chunks.trial or run.goes_on(number, site)):
            continue
        z_BLK = folded(run, site, number, narrow)
        if counts:
            target_BLO = run.take(TARGET, number)
            h_BLH, counted_BLK, target_BLO, left_BLO = (
                run.chunks.weighed(number, x).float()
                for x in (run.hidden_again(site, number), z_BLK, target_BLO, _less_own_bias(run, site, target_BLO))
            )
            own_BLO = h_BLH @ view.weight_OH.float().mT
            folding_BLO, difference_BLO = own_BLO - counted_BLK @ anchor_OK.mT, left_BLO - own_BLO
            with run.work.profile.phase("gram"):
                pairs.update(counted_BLK, own_BLO, folding_BLO)
                stream.update(counted_BLK, target_BLO, difference_BLO)
            mixed += dot(folding_BLO.flatten(0, -2), difference_BLO.flatten(0, -2), exact=job.affine)
        if run.work.spill:
            run.put(HIDDEN, number, z_BLK)
    pairs.sum_over(group)
    stream.sum_over(group)
    products = group.sum_(torch.tensor([mixed], dtype=torch.float64)).item()
    if job.affine:
        products -= pairs.count * (pairs.mean_difference @ stream.mean_difference).item()
    found = Prepared(
        reduction,
        lifted_OK,
        StreamSystem.of_pairs(lifted_OK, pairs, stream, form=job.recipe.ridge_form, name=site.name),
        lambda number: run.hidden_again(site, number) if run.work.spill else folded(run, site, number, narrow),
        lambda candidates: pair_errors(lifted_OK, candidates, pairs, stream, products),
        narrow=narrow,
        damping=chosen.damping,
    )
    if job.affine:
        found.base = _plus_own_bias(run, site, lifted_OK.double() @ pairs.mean + pairs.mean_difference)
        found.mean, found.mean_difference = pairs.mean, stream.mean_difference
    return found


def _less_own_bias(run: LayerPass, site: Site, target_BLO: Tensor) -> Tensor:
    """What of t a weight has to make."""
    own_O = run.job.consumer_bias(site)
    return target_BLO if own_O is None else target_BLO - own_O.to(run.device).float()


def _outputs(run: LayerPass, site: Site) -> int:
    return run.job.model.source.info(f"{site.consumer}.weight").shape[0]


def _plus_own_bias(run: LayerPass, site: Site, mean_O: Tensor) -> Tensor:
    own_O = run.job.consumer_bias(site)
    return mean_O if own_O is None else mean_O + own_O.double()
