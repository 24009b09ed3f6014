"""Stream a model layer by layer: load -> calibrate -> select -> compensate -> write -> free (DESIGN section 6).

Shapes: B windows, L tokens, D hidden size, H a site's width. A chunk is a batch of windows; its stream x [B, L, D] is
what lives between layers. Selectors and compensation see statistics and weights, families never see a selector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint.writer import OutputFolder, Piece
from .compensation import Compensation, compensate
from .errors import GrailError
from .evaluation.perplexity import chunked
from .families.base import Site
from .families.decoder import LAYERS, Block, Decoder
from .recipe import Recipe
from .reduction import Reduction, Selection
from .selectors import Selector, SiteView
from .selectors.base import PRODUCERS
from .statistics import GRAM, SiteStatistics

Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class SiteResult:
    """What was done at one site; `compensation` is None when it was only pruned, both None when nothing was removed."""

    site: Site
    reduction: Reduction | None = None
    compensation: Compensation | None = None


@dataclass
class Streamed:
    """Results of one pass over the model, in execution order, and the logits [1, L, V] of the probe window."""

    results: list[SiteResult] = field(default_factory=list)
    probe_logits: Tensor | None = None

    @property
    def reductions(self) -> dict[str, Reduction]:
        return {r.site.name: r.reduction for r in self.results if r.reduction is not None}


@dataclass
class Job:
    """One pass: the model, its sites, how many units each keeps, the method, and the recipe's compensation."""

    model: Decoder
    sites: list[Site]
    kept: dict[str, int]
    selector: Selector
    recipe: Recipe

    def changes(self, site: Site) -> bool:
        return self.kept[site.name] < site.units.per_group

    @property
    def statistics_needed(self) -> frozenset[str]:
        """Statistics gathered at each changed site; empty when no calibration data is needed at all."""
        wanted = self.selector.needs - {PRODUCERS}
        return wanted | {GRAM} if self.recipe.compensate else wanted

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics_needed) and any(map(self.changes, self.sites))


def stream(
    job: Job, windows_NL: Tensor | None, probe_1L: Tensor, out: OutputFolder, track: Track = lambda layers: layers
) -> Streamed:
    """Compress every site in order, writing one shard per layer and one for the rest. windows_NL [N, L] token ids;
    None when `job.needs_data` is false. The probe window runs through the result beside the calibration data."""
    model, streamed = job.model, Streamed()
    shards = model.layer_count + 1
    last = max((site.layer for site in job.sites if job.changes(site)), default=-1)
    chunks = [model.embed(ids) for ids in chunked(windows_NL)] if windows_NL is not None else []
    probe = model.embed(probe_1L)
    for layer in track(range(model.layer_count)):
        if layer > last:
            chunks = []
        block = model.block(layer)
        tensors, results, states = _layer(job, layer, block, [*chunks, probe], len(chunks))
        chunks, probe = states[:-1], states[-1]
        streamed.results += results
        out.write_shard(_shard_name(layer + 1, shards), _layer_pieces(job, layer, tensors))
    with torch.no_grad():
        streamed.probe_logits = model.tail()(probe).cpu()
    if not torch.isfinite(streamed.probe_logits).all():
        raise GrailError("the logits hold NaN or infinity; check the checkpoint's final norm and head")
    rest = [name for name in model.source.names() if model.layer_of(name) is None]
    out.write_shard(_shard_name(shards, shards), [_copied(job, name) for name in rest])
    return streamed


def _layer(
    job: Job, layer: int, block: Block, states: list[Tensor], counted: int
) -> tuple[dict[str, Tensor], list[SiteResult], list[Tensor]]:
    """One layer: the new tensors, the results, and each chunk's stream after the layer. The first `counted` chunks
    enter the statistics; the others (the probe) only pass through."""
    tensors: dict[str, Tensor] = {}
    results = []
    known: list[dict[str, Tensor]] = [{} for _ in states]
    for site in (s for s in job.sites if s.layer == layer):
        part = job.model.part_of(site)
        if not job.changes(site):
            for x_BLD, branches in zip(states, known, strict=True):
                branches[part] = block.consume(part, block.hidden(part, x_BLD, branches))
            results.append(SiteResult(site))
            continue
        statistics = SiteStatistics(site.units.width, job.statistics_needed, device=job.model.device)
        hidden: list[Tensor | None] = []
        for i, (x_BLD, branches) in enumerate(zip(states, known, strict=True)):
            h_BLH = block.hidden(part, x_BLD, branches)
            if i < counted:
                statistics.update(h_BLH)
            hidden.append(h_BLH)
        result, changed = _site(job, site, statistics)
        results.append(result)
        tensors |= changed
        weight_OK = changed[f"{site.consumer}.weight"]
        for i, branches in enumerate(known):
            h_BLH, hidden[i] = hidden[i], None
            branches[part] = block.consume(part, result.reduction.reduce(h_BLH), weight_OK)
    for i, branches in enumerate(known):
        states[i] = block.output(states[i], branches)
        if not torch.isfinite(states[i]).all():
            raise GrailError(
                f"{LAYERS}{layer}: its output holds NaN or infinity; check the checkpoint, or use --dtype float32 "
                f"where a narrower one overflows"
            )
    return tensors, results, states


def _site(job: Job, site: Site, statistics: SiteStatistics) -> tuple[SiteResult, dict[str, Tensor]]:
    """Select and compensate one site; its new tensors in their stored dtypes."""
    model, recipe = job.model, job.recipe
    if job.statistics_needed:
        statistics.check_finite(site.name)
    weight_OH = model.source.get(f"{site.consumer}.weight").to(model.device)
    producers = [p.name for p in site.producers] if PRODUCERS in job.selector.needs else []
    view = SiteView(
        name=site.name,
        kind=site.kind,
        units=site.units,
        weight_OH=weight_OH,
        producers={name: model.source.get(f"{name}.weight").to(model.device) for name in producers},
        statistics=statistics,
        kept=job.kept[site.name],
        seed=recipe.seed,
    )
    reduction = job.selector.select(view)
    if not isinstance(reduction, Selection):
        raise NotImplementedError("folding needs the narrowed producers to be run again (DESIGN section 1)")
    compensation = None
    if recipe.compensate:
        compensation = compensate(
            weight_OH,
            statistics.gram,
            reduction,
            ridge=recipe.ridge,
            form=recipe.ridge_form,
            name=site.name,
            dtype=_output_dtype(job, weight_OH.dtype),
        )
        weight_OK = compensation.weight
    else:
        weight_OK = reduction.lift_consumer(weight_OH).to(_output_dtype(job, weight_OH.dtype))
    return SiteResult(site, reduction, compensation), model.narrow(site, reduction, weight_OK)


def _layer_pieces(job: Job, layer: int, changed: dict[str, Tensor]) -> list[Piece]:
    """The layer's tensors in the source's order, the changed ones replaced."""
    names = [name for name in job.model.source.names() if job.model.layer_of(name) == layer]
    return [
        Piece.of(name, changed[name].to(_output_dtype(job, changed[name].dtype)))
        if name in changed
        else _copied(job, name)
        for name in names
    ]


def _copied(job: Job, name: str) -> Piece:
    """A tensor as it is, in raw chunks; converted only when another output dtype was asked for."""
    source = job.model.source
    info = source.info(name)
    dtype = _output_dtype(job, info.dtype)
    if dtype != info.dtype:
        return Piece.of(name, source.get(name).to(dtype))
    return Piece(name, info.dtype, info.shape, source.chunks(name))


def _output_dtype(job: Job, stored: torch.dtype) -> torch.dtype:
    asked = job.recipe.output_dtype
    return getattr(torch, asked) if asked and stored.is_floating_point else stored


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"
