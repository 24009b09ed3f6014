"""What happens at one site: gather, select, compensate, and go on from the result.

Shapes: H a site's width, K what is kept of it, O outputs of its consumer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grail_kernels.inputs import all_finite

from .compensation import compensate, compensate_pairs, mean_bias, solve_flops
from .errors import GrailError
from .families.base import Site
from .layer import HIDDEN, LayerPass
from .moments import PairStatistics
from .reduction import Reduction
from .result import SiteResult, from_main
from .selectors import SiteView
from .selectors.base import BLOCK_GRADIENTS, PRODUCERS
from .statistics import SiteStatistics


def compress(run: LayerPass, site: Site) -> SiteResult:
    """Select and compensate one site, and compute its branch from the result."""
    folds = run.job.selector.folds(site.kind)
    result, narrow = _fold(run, site) if folds else (_prune(run, site), {})
    result.check(strict=run.job.recipe.strict)
    apply(run, site, result, narrow if folds else None)
    return result


def apply(run: LayerPass, site: Site, result: SiteResult, narrow: dict[str, Tensor] | None) -> None:
    """Compute the site's branch from its result. narrow: the producers' tensors where these were folded, else None."""
    weight_OK, bias_O = (None if t is None else run.computed(t) for t in (result.weight, result.bias))
    for number in run.chunks.all:
        if not run.goes_on(number, site):
            continue
        if narrow is None:
            z_BLK = result.reduction.reduce(run.hidden_again(site, number))
        else:
            z_BLK = run.hidden_again(site, number) if run.work.spill else folded(run, site, number, narrow)
        run.consume(site, number, z_BLK, weight_OK, bias_O)
    run.close(run.part_of(site))


def view_of(run: LayerPass, site: Site, statistics: SiteStatistics) -> SiteView:
    """What the selector may look at."""
    job = run.job
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
        gradients_OH=run.gradient(site) if BLOCK_GRADIENTS in needs else None,
        windows=run.chunks.windows,
        affine=job.affine,
        biased=job.biased_producers(site),
    )


def select(run: LayerPass, view: SiteView) -> Reduction:
    """What the method chooses."""
    with run.work.profile.phase("select"):
        return run.job.selector.select(view)


def _prune(run: LayerPass, site: Site) -> SiteResult:
    """Gather, then select and repair in the main process."""
    view = view_of(run, site, run.gather(site, keep_counted=False))
    return from_main(run.work.group, site, lambda: select_and_repair(run, site, view))


def select_and_repair(run: LayerPass, site: Site, view: SiteView) -> SiteResult:
    """A reduction whose compressed vector follows from the dense one, z = R h, and its new consumer."""
    job, recipe = run.job, run.job.recipe
    reduction = select(run, view)
    dtype = job.written_dtype(view.weight_OH.dtype)
    lam = job.selector.own_ridge(view)
    compensation = bias_O = None
    if recipe.compensate or lam is not None:
        options = {"ridge": recipe.ridge, "form": recipe.ridge_form} if recipe.compensate else {"lam": lam}
        flops = solve_flops(len(view.weight_OH), reduction.width, reduction.kept_width)
        with run.work.profile.phase("solve", flops=flops):
            compensation = compensate(view.weight_OH, view.matrix, reduction, name=site.name, dtype=dtype, **options)
        weight_OK = compensation.weight
    else:
        weight_OK = reduction.lift_consumer(view.weight_OH).to(dtype)
    if job.affine:
        own_O = job.consumer_bias(site)
        bias_O = mean_bias(view.weight_OH, weight_OK, reduction, view.statistics, own_O).to(dtype)
    return SiteResult(site, reduction, compensation, weight_OK, bias_O, view.damping)


def _fold(run: LayerPass, site: Site) -> tuple[SiteResult, dict[str, Tensor]]:
    """Gather, select, and a new consumer; and the narrowed producers' tensors by their names within the layer.

    What these emit is not R h, since averaging does not commute with the non-linearity between: a second forward gives
    it, and takes the place of what was spilled.
    """
    job, recipe, group = run.job, run.job.recipe, run.work.group
    view = view_of(run, site, run.gather(site, keep_counted=True))
    reduction = from_main(group, site, lambda: SiteResult(site, select(run, view))).reduction
    narrow = narrowed_producers(run, site, reduction)
    dtype = job.written_dtype(view.weight_OH.dtype)
    lifted_OK = reduction.lift_consumer(view.weight_OH.double()).to(dtype)
    fits = recipe.compensate or job.affine
    pairs = PairStatistics(reduction.kept_width, len(lifted_OK), device=run.device, affine=job.affine)
    dense_OH, anchor_OK = view.weight_OH.float(), lifted_OK.float()
    for number in run.chunks.all:
        counts = fits and number in run.chunks.counted
        if not counts and not run.goes_on(number, site):
            continue
        z_BLK = folded(run, site, number, narrow)
        if counts:
            h_BLH, counted_BLK = (run.chunks.weighed(number, x) for x in (run.hidden_again(site, number), z_BLK))
            target_BLO = h_BLH.float() @ dense_OH.mT
            with run.work.profile.phase("gram"):
                pairs.update(counted_BLK, target_BLO, target_BLO - counted_BLK.float() @ anchor_OK.mT)
        if run.work.spill:
            run.put(HIDDEN, number, z_BLK)
    pairs.sum_over(group)

    def repair() -> SiteResult:
        if not recipe.compensate:
            bias_O = pairs.mean_difference if job.affine else None
            return SiteResult(site, reduction, None, lifted_OK, _with_own_bias(run, site, bias_O, dtype))
        options = {"ridge": recipe.ridge, "form": recipe.ridge_form, "name": site.name, "dtype": dtype}
        with run.work.profile.phase("solve"):
            found = compensate_pairs(lifted_OK, pairs, **options)
        return SiteResult(site, reduction, found, found.weight, _with_own_bias(run, site, found.bias, dtype))

    return from_main(group, site, repair), narrow


def narrowed_producers(run: LayerPass, site: Site, reduction: Reduction) -> dict[str, Tensor]:
    """The producers' tensors after a reduction, as they are computed with, by their names within the layer."""
    return {run.local(name): run.computed(t) for name, t in run.job.narrow_producers(site, reduction).items()}


def folded(run: LayerPass, site: Site, number: int, narrow: dict[str, Tensor]) -> Tensor:
    """What the narrowed producers emit for a chunk. Raises GrailError when it is not finite."""
    with run.block.with_tensors(narrow):
        z_BLK = run.hidden(site, number)
    if not all_finite(z_BLK):
        raise GrailError(
            f"{site.name}: the folded channels carry NaN or infinite activations; check the checkpoint, or use --dtype "
            f"float32 where a narrower one overflows"
        )
    return z_BLK


def _with_own_bias(run: LayerPass, site: Site, added_O: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    own_O = run.job.consumer_bias(site)
    if added_O is None:
        return None
    return (added_O if own_O is None else added_O + own_O.double()).to(dtype)
