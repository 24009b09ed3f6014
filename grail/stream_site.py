"""What happens at one site with --target stream: the dense network runs beside, and the consumer's new weight also
makes up for what all sites before it got wrong (stream_repair.py), as far as held-out windows say that it pays
(trials.py).

Shapes: H a site's width, K what is kept of it, O outputs of its consumer; B windows, L tokens, T of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .compensation import Compensation
from .families.base import Site
from .layer import HIDDEN, LayerPass
from .moments import CrossMoments, PairStatistics, dot
from .recipe import AUTO
from .reduction import Reduction, Selection
from .result import SiteResult, from_main
from .sites import apply, folded, narrowed_producers, select, view_of
from .statistics import SiteStatistics
from .stream_repair import StreamSolution, StreamSystem, pair_errors, selection_errors
from .trials import RIDGES, TrialErrors, TrialMoments
from .twin import TARGET, WEIGHT, Twin


@dataclass
class Prepared:
    """A site before its solve. z: the compressed hidden vectors of a chunk; errors: figures of candidates [O, K]; with
    a bias: base, the mean output that the own repair should have [O], and the means of z [K] and of D [O]; narrow: the
    producers of a folding."""

    reduction: Reduction
    lifted: Tensor
    system: StreamSystem
    z: Callable[[int], Tensor]
    errors: Callable[[list[Tensor]], list[float]]
    base: Tensor | None = None
    mean: Tensor | None = None
    mean_difference: Tensor | None = None
    narrow: dict[str, Tensor] = field(default_factory=dict)

    def biases(self, own_OK: Tensor, stream_OK: Tensor) -> tuple[Tensor, Tensor]:
        """(b₀, b₁), float64 [O], of P and S."""
        return self.base - own_OK.double() @ self.mean, self.mean_difference - stream_OK.double() @ self.mean


def compress(run: LayerPass, twin: Twin, site: Site) -> SiteResult:
    """Select and repair one site towards the dense stream, and compute its branch from the result."""
    folds = run.job.selector.folds(site.kind) and run.job.changes(site)
    prepared = _fold(run, twin, site) if folds else _prune(run, twin, site)
    result = _repair(run, site, prepared)
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
    reduction = _selection(run, site, lambda: select(run, view))
    weight_OH, gram = view.weight_OH, view.matrix
    with run.work.profile.phase("solve"):
        stream.minus_(weight_OH, gram)
    found = Prepared(
        reduction,
        reduction.lift_consumer(weight_OH),
        StreamSystem.of_selection(weight_OH, gram, stream.cross, reduction, form=job.recipe.ridge_form, name=site.name),
        lambda number: reduction.reduce(run.hidden_again(site, number)),
        lambda candidates: selection_errors(weight_OH, candidates, reduction, gram, stream),
    )
    if job.affine:
        mean_H = statistics.mean()
        found.base = _plus_own_bias(run, site, weight_OH.double() @ mean_H)
        found.mean, found.mean_difference = reduction.reduce(mean_H), stream.mean_difference
    return found


def _selection(run: LayerPass, site: Site, choose: Callable[[], Reduction]) -> Reduction:
    """What the main process chooses; everything, where nothing is to be removed."""
    units = site.units
    if not run.job.changes(site):
        return Selection(torch.arange(units.count), units.size, units.width)
    return from_main(run.work.group, site, lambda: SiteResult(site, choose())).reduction


def _fold(run: LayerPass, twin: Twin, site: Site) -> Prepared:
    """Gather and select; then a second forward, since the narrowed producers do not emit R h."""
    job, group = run.job, run.work.group
    twin.targets(site)
    twin.passed(site)
    view = view_of(run, site, run.gather(site, keep_counted=True))
    reduction = _selection(run, site, lambda: select(run, view))
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
    )
    if job.affine:
        found.base = _plus_own_bias(run, site, lifted_OK.double() @ pairs.mean + pairs.mean_difference)
        found.mean, found.mean_difference = pairs.mean, stream.mean_difference
    return found


def _repair(run: LayerPass, site: Site, prepared: Prepared) -> SiteResult:
    """Solve for every candidate ridge, let the held-out windows decide, and give all processes the best."""
    recipe, group, system = run.job.recipe, run.work.group, prepared.system
    dtype = run.job.written_dtype(prepared.lifted.dtype)
    alpha = None if recipe.alpha == AUTO else recipe.alpha
    ridges = RIDGES if recipe.ridge == AUTO else (recipe.ridge,)
    single = alpha is not None and len(ridges) == 1
    trial = None if single else _trial_moments(run, site, prepared)
    best: tuple[float, Compensation | None] | None = None
    for ridge in ridges:
        solution = _solved(run, system, ridge, alpha if single else None)
        errors = None if single else _tried(run, site, prepared, solution, trial)
        chosen = alpha if alpha is not None else errors.best_alpha
        value = 0.0 if single else errors.at(chosen)
        if best is None or value < best[0]:
            best = value, solution and _compensation(solution, chosen, dtype, errors)
    done = best[1]

    def finished() -> SiteResult:
        bias_O = None
        done.effective_rank = system.effective_rank
        done.error_before, done.error_after = prepared.errors([prepared.lifted.to(dtype), done.weight])
        if run.job.affine:
            own_O, stream_O = prepared.base, done.alpha * prepared.mean_difference
            bias_O = (own_O + stream_O - done.weight.double() @ prepared.mean).to(dtype)
        return SiteResult(site, prepared.reduction, done, done.weight, bias_O)

    return from_main(group, site, finished)


def _solved(run: LayerPass, system: StreamSystem, ridge: float, alpha: float | None) -> StreamSolution | None:
    """In the main process."""
    if not run.work.group.main:
        return None
    with run.work.profile.phase("solve"):
        return StreamSolution(system, ridge * system.scale, alpha)


def _compensation(
    solution: StreamSolution, alpha: float, dtype: torch.dtype, errors: TrialErrors | None
) -> Compensation:
    solved = solution.solved
    held_out = None if errors is None else (errors.at(0.0), errors.at(alpha))
    return Compensation(
        solution.weight(alpha, dtype), solved.lam, solved.retries, solved.info, solved.rcond, 0.0, 0.0,
        alpha=alpha, held_out=held_out,
    )  # fmt: skip


def _trial_moments(run: LayerPass, site: Site, prepared: Prepared) -> TrialMoments:
    """Of this process's held-out windows."""
    biased = run.job.affine or run.job.consumer_bias(site) is not None
    found = TrialMoments(prepared.reduction.kept_width, _outputs(run, site), device=run.device, biased=biased)
    for number in run.chunks.trial:
        z_BLK, target_BLO = prepared.z(number), run.take(TARGET, number)
        weight_BL = run.take(WEIGHT, number) * run.chunks.weights.get(number, torch.ones(())).to(run.device)
        with run.work.profile.phase("trials"):
            found.update(z_BLK, target_BLO, weight_BL)
    return found


def _tried(
    run: LayerPass, site: Site, prepared: Prepared, solution: StreamSolution | None, trial: TrialMoments
) -> TrialErrors:
    """How P and S do on the held-out windows of all processes."""
    group = run.work.group
    own_OK, stream_OK = (
        group.broadcast_tensor(rows(slice(None)).float() if solution else None)
        for rows in (solution and solution.own, solution and solution.stream)
    )
    biases = (None, None)
    if run.job.affine:
        biases = tuple(bias_O.float() for bias_O in prepared.biases(own_OK, stream_OK))
    elif (own_O := run.job.consumer_bias(site)) is not None:
        biases = (own_O.float(), None)
    with run.work.profile.phase("trials"):
        found = trial.errors((own_OK, biases[0]), (stream_OK, biases[1]))
    return found.sum_over(group)


def _less_own_bias(run: LayerPass, site: Site, target_BLO: Tensor) -> Tensor:
    """What of t a weight has to make."""
    own_O = run.job.consumer_bias(site)
    return target_BLO if own_O is None else target_BLO - own_O.to(run.device).float()


def _outputs(run: LayerPass, site: Site) -> int:
    return run.job.model.source.info(f"{site.consumer}.weight").shape[0]


def _plus_own_bias(run: LayerPass, site: Site, mean_O: Tensor) -> Tensor:
    own_O = run.job.consumer_bias(site)
    return mean_O if own_O is None else mean_O + own_O.double()
