"""Stream a model layer by layer: load -> calibrate -> select -> compensate -> write -> free (DESIGN section 6).

Shapes: L tokens of a window, D hidden size. Selectors and compensation see statistics and weights, families never see a
selector. Every layer is a committed step; a run that was cut off goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grail_kernels.inputs import all_finite

from .checkpoint.background import Background
from .checkpoint.journal import understood
from .checkpoint.pieces import Piece
from .checkpoint.writer import SHARD, OutputFolder
from .chunks import Chunks, Texts
from .errors import Circumstance, GrailError
from .job import Job
from .layer import LayerPass
from .machine import apart
from .reduction import Reduction
from .report import site_entry
from .result import SiteResult
from .sites import compress
from .store import ChunkStore
from .stream_site import compress as compress_towards
from .training import LayerTraining, Training
from .twin import Twin, beside
from .workspace import Workspace

Track = Callable[[Iterable[int]], Iterable[int]]
Tell = Callable[[dict[str, Any]], None]
LAYER = "layer"


@dataclass
class Streamed:
    """Results of one pass over the model, in execution order; how each trained layer fared; and, in the main process,
    the logits [1, L, V] of the probe window."""

    results: list[SiteResult] = field(default_factory=list)
    trained: list[Training] = field(default_factory=list)
    probe_logits: Tensor | None = None

    @property
    def reductions(self) -> dict[str, Reduction]:
        return {r.site.name: r.reduction for r in self.results if r.reduction is not None}


def stream(
    job: Job,
    work: Workspace,
    texts: Texts,
    out: OutputFolder,
    track: Track = lambda layers: layers,
    name: str = "stream",
    tell: Tell = lambda entry: None,
) -> Streamed:
    """Compress every site in order, writing one shard per layer and one for the rest. texts: without calibration
    windows when `job.needs_data` is false; the probe window runs through the result beside them.

    Layers that `out` holds already, committed by an earlier run, are taken from there. Only the main process writes.
    name: of the pass in the workspace's store; what lies there under another pass's name is not touched. tell: is given
    each site's entry of grail.json, also of those taken from the earlier run.
    """
    model, streamed = job.model, Streamed()
    chunks = Chunks.of(work, name, texts)
    chunks.lasting = out.keep
    last = max((site.layer for site in job.sites if job.touches(site)), default=-1)
    first = _recalled(job, chunks, out, streamed, last)
    _tell(streamed, range(first), tell)
    if first == 0:
        _embed(job, _streams(job, chunks))
    with Background(out, work.group, work.profile, enabled=work.ahead) as background:
        for layer in track(range(first, model.layer_count)):
            if layer > last:
                chunks.learn_no_more()
            background.read_ahead(model.source, _names(job, layer + 1))
            wanted = chunks.all if layer < last else chunks.passing
            _compress_layer(LayerPass(job, layer, chunks, wanted), streamed, background)
            _tell(streamed, [layer], tell)  # its shard is on its way by now: stopped here, the layer is kept
        background.settle()
    if work.group.main:
        _write_rest(job, chunks, streamed, out)
    return streamed


def _embed(job: Job, streams: list[Chunks]) -> None:
    """The hidden states before the first layer."""
    for part in streams:
        for number in part.all:
            states_BLD = job.model.embed(part.ids[number])
            part.work.store.put(part.series(0), number, states_BLD, lasting=part.lasting)


def _streams(job: Job, chunks: Chunks) -> list[Chunks]:
    """The compressed stream, and the dense one where it runs beside."""
    return [chunks, beside(chunks)] if job.streams else [chunks]


def _compress_layer(run: LayerPass, streamed: Streamed, background: Background) -> None:
    """One layer, up to handing its shard to the writer."""
    job, chunks, group = run.job, run.chunks, run.work.group
    options = job.selector.regional_options()
    run.trained = bool(options) and any(map(job.changes, run.sites))
    twin = Twin(run) if job.streams and chunks.windows else None  # in all processes, also one without a chunk
    training = LayerTraining(run, options, twin) if run.trained else None
    results, tensors = [], {}
    for site in run.sites:
        if site == run.sites[-1]:
            background.settle()  # before this site's solve, the largest of the layer, needs the memory
        if not job.touches(site):
            if twin is not None:
                twin.pass_through(site)
            run.pass_through(site)
            results.append(SiteResult(site))
            continue
        result = compress(run, site) if twin is None else compress_towards(run, twin, site)
        if group.main:
            tensors |= _narrowed(job, result)
        if training is None:
            result = result.without_tensors()  # their copies are enough
        results.append(result)
    if training is not None:
        tensors = training.train(results)
        streamed.trained.append(training.outcome)
        training.outputs()
    run.end()
    ended = [(chunks.series(run.layer), list(chunks.all))]
    if twin is not None:
        ended.append(twin.end())
    results = [result.without_tensors() for result in results]
    streamed.results += results
    background.write(
        _shard_name(run.layer + 1, job),
        _layer_pieces(job, run.layer, tensors, streamed.reductions) if group.main else None,
        partial(_drop, run.work.store, ended),  # and nothing that holds the layer itself
        layer=run.layer,
        sites=[result.to_json() for result in results],
        trained=training and vars(training.outcome),
    )


def tell_sites(streamed: Streamed, tell: Tell) -> None:
    """Say what became of all sites."""
    _tell(streamed, {result.site.layer for result in streamed.results}, tell)


def _tell(streamed: Streamed, layers: Iterable[int], tell: Tell) -> None:
    """Say what became of the sites of these layers."""
    told, trained = set(layers), {training.layer for training in streamed.trained}
    for result in streamed.results:
        if result.site.layer in told:
            tell(site_entry(result, result.site.layer in trained))


def _drop(store: ChunkStore, series: list[tuple[str, list[int]]]) -> None:
    """Give up chunks of several series."""
    for name, numbers in series:
        store.drop(name, numbers)


def _narrowed(job: Job, result: SiteResult) -> dict[str, Tensor]:
    """A site's tensors after the reduction, which wait for the writer until the middle of the next layer."""
    found = job.model.narrow(result.site, result.reduction, result.weight, result.bias)
    return {name: apart(found.pop(name)) for name in list(found)}


def _recalled(job: Job, chunks: Chunks, out: OutputFolder, streamed: Streamed, last: int) -> int:
    """The first layer that is still to be done; what is known of those before it is put into `streamed`."""
    group, store = chunks.work.group, chunks.work.store
    steps = group.broadcast([s for s in out.journal.find(SHARD) if LAYER in s] if group.main else None)
    first = len(steps)
    if not first:
        return 0
    streams = [chunks] if first > last else _streams(job, chunks)
    needed = {part.name: part.all if first <= last else part.passing for part in streams}
    sound = store.outlives_process and all(store.holds(part.series(first), needed[part.name]) for part in streams)
    if group.main:
        with understood(out.journal.path):
            sound = sound and all(out.recall(step) for step in steps)
    if not all(group.gather(sound)):
        if group.main:
            out.start_over(lambda step: step["step"] != SHARD)
        return 0
    sites = {site.name: site for site in job.sites}
    with understood(out.journal.path):
        for step in steps:
            results = [SiteResult.from_json(sites[found["site"]], found) for found in step["sites"]]
            streamed.results += results
            if job.recipe.strict:
                _refuse_raised(results)
            if step["trained"]:
                streamed.trained.append(Training(**step["trained"]))
    for part in _streams(job, chunks):
        for layer in range(first):
            store.drop(part.series(layer), part.all)
    return first


def _refuse_raised(results: list[SiteResult]) -> None:
    """For --strict, of what an earlier run did without it, which keeps its work."""
    try:
        for result in results:
            result.refuse_raised()
    except GrailError as error:
        raise Circumstance(str(error)) from error


def _write_rest(job: Job, chunks: Chunks, streamed: Streamed, out: OutputFolder) -> None:
    """The probe's logits, and the shard of what belongs to no layer."""
    model = job.model
    probe = chunks.work.store.get(chunks.series(model.layer_count), chunks.probe, model.device)
    with torch.no_grad(), chunks.work.profile.phase("head"):
        streamed.probe_logits = model.tail()(probe).cpu()
    if not torch.isfinite(streamed.probe_logits).all():
        raise GrailError("the logits hold NaN or infinity; check the checkpoint's final norm and head")
    with chunks.work.profile.phase("write"):
        out.write_shard(_shard_name(model.layer_count + 1, job), [_copied(job, name) for name in _names(job, None)])


def _layer_pieces(job: Job, layer: int, changed: dict[str, Tensor], reductions: dict[str, Reduction]) -> list[Piece]:
    """The layer's tensors in the source's order, the changed ones replaced, what the format adds at the end."""
    if job.format is not None:
        changed = job.format.layer_tensors(layer, changed, reductions)
    names = _names(job, layer)
    added = [name for name in changed if name not in job.model.source]
    return [_changed(job, name, changed[name]) if name in changed else _copied(job, name) for name in names + added]


def _changed(job: Job, name: str, tensor: Tensor) -> Piece:
    """A new tensor, in the dtype that is written."""
    dtype = job.written_dtype(tensor.dtype)
    tensor = tensor.to(dtype)
    if not all_finite(tensor):
        raise GrailError(f"{name}: what it is repaired to overflows {dtype}; use a wider --output-dtype")
    return Piece.of(name, tensor)


def _copied(job: Job, name: str) -> Piece:
    """A tensor as it is, in raw chunks; converted only when another output dtype was asked for."""
    source = job.model.source
    info = source.info(name)
    dtype = job.written_dtype(info.dtype)
    if dtype != info.dtype:
        return Piece.of(name, source.get(name).to(dtype))
    return Piece(name, info.dtype, info.shape, source.chunks(name))


def _names(job: Job, layer: int | None) -> list[str]:
    """The names of a layer's tensors, or of those that belong to none."""
    return [name for name in job.model.source.names() if job.model.layer_of(name) == layer]


def _shard_name(number: int, job: Job) -> str:
    return f"model-{number:05d}-of-{job.model.layer_count + 1:05d}.safetensors"
