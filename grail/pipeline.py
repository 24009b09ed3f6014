"""Stream a model layer by layer: load -> calibrate -> select -> compensate -> write -> free (DESIGN section 6).

Shapes: B windows, L tokens, D hidden size. A chunk is a batch of windows; its stream x [B, L, D] is what lives between
layers. Selectors and compensation see statistics and weights, families never see a selector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint.writer import OutputFolder, Piece
from .errors import GrailError
from .evaluation.perplexity import chunked
from .job import Job
from .reduction import Reduction
from .selectors.base import BLOCK_GRADIENTS, PRODUCERS
from .sites import LayerPass, SiteResult, without_working_tensors
from .statistics import SiteStatistics
from .training import LayerTraining, Training

Track = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class Streamed:
    """Results of one pass over the model, in execution order; how each trained layer fared; and the logits [1, L, V] of
    the probe window."""

    results: list[SiteResult] = field(default_factory=list)
    trained: list[Training] = field(default_factory=list)
    probe_logits: Tensor | None = None

    @property
    def reductions(self) -> dict[str, Reduction]:
        return {r.site.name: r.reduction for r in self.results if r.reduction is not None}


def survey(job: Job, windows_NL: Tensor | None, track: Track = lambda layers: layers) -> dict[str, Tensor]:
    """Comparable unit scores [U] of every site of the dense network, by site name: the first of two passes, for an
    allocation over the whole network."""
    selector, scores = job.selector, {}
    needed = [selector.needs_of(site.kind) - {PRODUCERS} for site in job.sites]
    chunks = _embedded(job, windows_NL) if any(needed) else []
    for layer in track(range(job.model.layer_count)):
        run = LayerPass(job, layer, chunks, len(chunks))
        for site in run.sites:
            needs = selector.needs_of(site.kind) - {PRODUCERS, BLOCK_GRADIENTS}
            statistics = SiteStatistics(site.units.width, needs, device=job.model.device, affine=job.affine)
            if chunks:
                run.pass_through(site, statistics)
            if needs:
                statistics.check_finite(site.name)
            scores[site.name] = selector.global_scores(run.view(site, statistics)).cpu()
        chunks = run.outputs() if chunks else chunks
    return scores


def stream(
    job: Job, windows_NL: Tensor | None, probe_1L: Tensor, out: OutputFolder, track: Track = lambda layers: layers
) -> Streamed:
    """Compress every site in order, writing one shard per layer and one for the rest. windows_NL [N, L] token ids;
    None when `job.needs_data` is false. The probe window runs through the result beside the calibration data."""
    model, streamed = job.model, Streamed()
    shards = model.layer_count + 1
    last = max((site.layer for site in job.sites if job.changes(site)), default=-1)
    chunks = _embedded(job, windows_NL)
    probe = model.embed(probe_1L)
    for layer in track(range(model.layer_count)):
        if layer > last:
            chunks = []
        run = LayerPass(job, layer, [*chunks, probe], len(chunks))
        tensors, states = _layer(run, streamed)
        chunks, probe = states[:-1], states[-1]
        out.write_shard(_shard_name(layer + 1, shards), _layer_pieces(job, layer, tensors, streamed.reductions))
    with torch.no_grad():
        streamed.probe_logits = model.tail()(probe).cpu()
    if not torch.isfinite(streamed.probe_logits).all():
        raise GrailError("the logits hold NaN or infinity; check the checkpoint's final norm and head")
    rest = [name for name in model.source.names() if model.layer_of(name) is None]
    out.write_shard(_shard_name(shards, shards), [_copied(job, name) for name in rest])
    return streamed


def _embedded(job: Job, windows_NL: Tensor | None) -> list[Tensor]:
    return [job.model.embed(ids) for ids in chunked(windows_NL)] if windows_NL is not None else []


def _layer(run: LayerPass, streamed: Streamed) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One layer: its new tensors by full name, and each chunk's stream after it."""
    job = run.job
    options = job.selector.regional_options()
    training = LayerTraining(run, options) if options and any(map(job.changes, run.sites)) else None
    results, tensors = [], {}
    for site in run.sites:
        if not job.changes(site):
            run.pass_through(site)
            results.append(SiteResult(site))
            continue
        result = run.compress(site)
        results.append(result)
        tensors |= job.model.narrow(site, result.reduction, result.weight, result.bias)
    if training is not None:
        tensors = training.train(results)
        streamed.trained.append(training.outcome)
        states = training.outputs()
    else:
        states = run.outputs()
    streamed.results += map(without_working_tensors, results)
    return tensors, states


def _layer_pieces(job: Job, layer: int, changed: dict[str, Tensor], reductions: dict[str, Reduction]) -> list[Piece]:
    """The layer's tensors in the source's order, the changed ones replaced, what the format adds at the end."""
    if job.format is not None:
        changed = job.format.layer_tensors(layer, changed, reductions)
    names = [name for name in job.model.source.names() if job.model.layer_of(name) == layer]
    added = [name for name in changed if name not in job.model.source]
    return [
        Piece.of(name, changed[name].to(job.written_dtype(changed[name].dtype)))
        if name in changed
        else _copied(job, name)
        for name in names + added
    ]


def _copied(job: Job, name: str) -> Piece:
    """A tensor as it is, in raw chunks; converted only when another output dtype was asked for."""
    source = job.model.source
    info = source.info(name)
    dtype = job.written_dtype(info.dtype)
    if dtype != info.dtype:
        return Piece.of(name, source.get(name).to(dtype))
    return Piece(name, info.dtype, info.shape, source.chunks(name))


def _shard_name(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"
