"""Every site of a network in memory: gather, select, narrow the producers, repair the consumer, go on.

Closed loop (the default): statistics are those of the network as compressed so far; the target is what the dense
network's consumer reads ("dense") or what the compressed one's would have read ("own"), or the dense residual stream
("stream", stream_target.py; where none is known, "dense"). One-shot: all statistics come from the dense network. Shapes
as in narrow.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from grail_kernels.inputs import all_finite

from ..compensation import Compensation, compensate
from ..errors import GrailError
from ..families.network import ModuleSite, Network
from ..progress import Progress
from ..recipe import AUTO, RIDGE
from ..reduction import Folding, Reduction
from ..report import site_entry
from ..result import SiteResult
from ..selectors import Selector, SiteView
from ..selectors.base import BLOCK_GRADIENTS, PRODUCERS
from ..statistics import GRAM, MOMENTS, SiteStatistics
from . import narrow, stream_target
from .pairs import HiddenPairs
from .recipe import OWN, ModuleRecipe
from .stream import Stream, watched


def refuse_decoder_methods(selector: Selector) -> None:
    """Raises GrailError for a method that needs the layers of a decoder."""
    if selector.regional_options() is not None or BLOCK_GRADIENTS in selector.needs:
        raise GrailError(f"--method {selector.name} trains decoder layers: it is for language models")


@dataclass
class ModulePass:
    """dense: the network as it was given; work: the one that is narrowed, a copy; batches: calibration inputs, of which
    there may be none where nothing needs them; kept: units by site name; counted: which tokens of each batch enter the
    statistics, bool [B, L] (None: all). trial and trial_counted: the same of inputs that only decide between candidates
    of --target stream."""

    dense: Network
    work: Network
    batches: list[Tensor]
    kept: dict[str, int]
    selector: Selector
    recipe: ModuleRecipe
    counted: list[Tensor] | None = None
    trial: list[Tensor] = field(default_factory=list)
    trial_counted: list[Tensor] | None = None

    def __post_init__(self):
        refuse_decoder_methods(self.selector)
        for site in self.work.sites:
            changes = self.kept[site.name] < site.units.count
            if changes and site.readers and (self.recipe.one_shot or self.selector.updates_weights()):
                what = "--one-shot" if self.recipe.one_shot else f"--method {self.selector.name}"
                raise GrailError(f"{what} is not offered for residual streams: leave out --residual-ratio")
            if changes and site.reader_norms and self.selector.folds(site.role):
                raise GrailError(
                    f"{site.name}: its readers normalise it each in their own way, so that it cannot be folded; choose "
                    f"another method, or leave out --residual-ratio"
                )
            if changes and site.units.size > 1 and self.selector.folds(site.role):
                raise GrailError(
                    f"{site.name}: {site.consumer} reads each channel {site.units.size} times, which --method "
                    f"{self.selector.name} cannot fold; choose another method"
                )
        self.affine = self.selector.bias if self.recipe.bias is None else self.recipe.bias
        self.streams = self.recipe.streams
        self.follows_dense = self.recipe.one_shot or self.recipe.target != OWN
        self.own_ridge = RIDGE if self.recipe.ridge == AUTO else self.recipe.ridge

    def run(self, progress: Progress, tell: Callable[[dict], None]) -> list[SiteResult]:
        """Narrow `work` site by site; tell: is given each one's entry of grail.json. Raises GrailError naming a site
        that cannot be repaired."""
        self.dense_stream = Stream(self.dense, self.batches) if self.follows_dense else None
        self.work_stream = None if self.recipe.one_shot else Stream(self.work, self.batches)
        self.trial_streams = [Stream(network, self.trial) for network in (self.dense, self.work) if self.trial]
        results: dict[str, SiteResult] = {}
        blocks = self.work.blocks or [""]
        for number in progress.layers("compressing")(range(len(blocks))):
            for site in (s for s in self.work.sites if self.work.block_of(s.consumer) == blocks[number]):
                changes = self.kept[site.name] < site.units.count
                results[site.name] = self._compress(site) if changes else SiteResult(site)
                results[site.name].check(strict=self.recipe.strict)
                tell(site_entry(results[site.name], trained=False))
            for stream in filter(None, (self.dense_stream, self.work_stream, *self.trial_streams)):
                stream.advance(blocks[number])
        return [results[site.name] for site in self.work.sites]

    def scores(self) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Unit scores of the dense network, for an allocation over all of it: a pass of its own. Beside them, by site,
        λ as asked and as used where the method's own had to be raised. Raises GrailError there where that is strict."""
        self.work_stream, self.dense_stream = None, Stream(self.dense, self.batches)
        found, raised = {}, {}
        for block in self.dense.blocks or [""]:
            for site in (s for s in self.dense.sites if self.dense.block_of(s.consumer) == block):
                statistics = self._gather(site)
                view = self._view(site, statistics)
                found[site.name] = self.selector.global_scores(view)
                if view.damping is not None and view.damping.raised is not None:
                    raised[site.name] = list(view.damping.raised)
                    if self.recipe.strict:
                        view.damping.refuse_raised(site.name)
            self.dense_stream.advance(block)
        return found, raised

    def _compress(self, site: ModuleSite) -> SiteResult:
        view = self._view(site, self._gather(site))
        reduction = self.selector.select(view)
        target = self.dense_stream if self._reads_dense(site) else self.work_stream.at(self.work.clone())
        emitted = self._narrowed(site, reduction)
        found = [self._consumed(view, reduction, site, name, target, emitted) for name in site.consumers]
        if isinstance(reduction, Folding):
            self._settle_norms(site, emitted)
        for name in (*site.consumers, *site.norms):
            layer = self.work.layer(name)
            if not all(all_finite(parameter) for parameter in layer.parameters(recurse=False)):
                raise GrailError(
                    f"{site.name}: what {name} is repaired to overflows {layer.weight.dtype}; give the network in a "
                    f"wider dtype, or more --ridge"
                )
        compensation = _together([done for done in found if done is not None])
        return SiteResult(site, reduction, compensation, damping=view.damping)

    def _consumed(
        self, view: SiteView, reduction: Reduction, site: ModuleSite, name: str, target: Stream, emitted: Stream
    ) -> Compensation | None:
        """Give a consumer its new weight; what the repair took, without it, or None where there is none."""
        consumer = self.work.layer(name)
        weight_OH = narrow.consumer_matrix(consumer)
        own = self._repairs(view, weight_OH, reduction, site, name, target, emitted)
        lifted_OK, old = reduction.lift_consumer(weight_OH), _Frozen(consumer)
        if own is not None and self._streams(site):
            found = self._towards_stream(own, lifted_OK, site, target, emitted)
        else:
            found = own and own(self.own_ridge)
        narrow.set_consumer(consumer, lifted_OK if found is None else found.weight)
        if found is not None and found.bias is not None:
            narrow.set_bias(consumer, found.bias)
        elif self.affine:
            self._fit_bias(name, old, consumer, target, emitted)
        return found and replace(found, weight=None, bias=None)

    def _streams(self, site: ModuleSite) -> bool:
        """Whether the site's consumer is repaired towards the dense residual stream."""
        return self.streams and site.stream is not None

    def _reads_dense(self, site: ModuleSite) -> bool:
        """Whether compressed hidden vectors stand for the dense network's, and not for what the compressed one's would
        be."""
        return self.follows_dense and not self._streams(site)

    def _towards_stream(
        self, own: Callable[[float], Compensation], lifted_OK: Tensor, site: ModuleSite, target: Stream, emitted: Stream
    ) -> Compensation:
        beside = stream_target.Beside(site, self.dense_stream, target, emitted, self.counted)
        trial = None
        if self.trial_streams:
            dense, narrowed = self.trial_streams
            trial = stream_target.Beside(site, dense, narrowed.at(target.network), narrowed, self.trial_counted)
        return stream_target.repair(beside, trial, own, lifted_OK, self.recipe, affine=self.affine)

    def _gather(self, site: ModuleSite) -> SiteStatistics:
        """Statistics of what all consumers read."""
        needs = self.selector.needs_of(site.role) - {PRODUCERS}
        folds = self.selector.folds(site.role)
        if not folds and (self.recipe.compensate or self.selector.updates_weights()):
            needs = needs | {GRAM}
        if self.affine and not folds:
            needs = needs | {MOMENTS}
        stream = self.work_stream or self.dense_stream
        layers = [stream.network.layer(name) for name in site.consumers]
        statistics = SiteStatistics(site.units.width, needs, device=layers[0].weight.device, affine=self.affine)
        if needs:
            with watched(layers, lambda i, x: statistics.update(self._rows(layers[i], x, stream.number))):
                for _ in stream.hidden(site.consumers[-1]):
                    pass
            statistics.check_finite(site.name, "give the network in float32")
        return statistics

    def _rows(self, consumer: nn.Module, hidden: Tensor, number: int) -> Tensor:
        """What counts of a batch of the consumer's inputs."""
        rows = narrow.rows_of(consumer, hidden)
        return rows if self.counted is None else rows[self.counted[number]]

    def _view(self, site: ModuleSite, statistics: SiteStatistics) -> SiteView:
        rows = narrow.fused_rows(self.work, site) if PRODUCERS in self.selector.needs_of(site.role) else {}
        weights = [narrow.consumer_matrix(self.work.layer(name)) for name in site.consumers]
        return SiteView(
            name=site.name,
            kind=site.role,
            units=site.units,
            weight_OH=weights[0] if len(weights) == 1 else torch.cat(weights),
            producers=rows,
            statistics=statistics,
            kept=self.kept[site.name],
            seed=self.recipe.seed,
            windows=sum(map(len, self.batches)),
            affine=self.affine,
            biased=frozenset(rows),
        )

    def _narrowed(self, site: ModuleSite, reduction: Reduction) -> Stream:
        """Narrow the producers, and the stream in which the compressed hidden vector can be seen."""
        narrow.narrow_producers(self.work, site, reduction)
        if self.work_stream is not None:
            return self.work_stream
        shadow = self.dense.clone()
        narrow.narrow_producers(shadow, site, reduction)
        return self.dense_stream.at(shadow)

    def _settle_norms(self, site: ModuleSite, emitted: Stream) -> None:
        """Give BatchNorms that were fused into averaged rows the statistics of their inputs."""
        if not site.norms or not self.batches:
            return
        norms = [emitted.network.layer(name) for name in site.norms]
        seen = [SiteStatistics(norm.num_features, frozenset({MOMENTS}), device=norm.bias.device) for norm in norms]
        with watched(norms, lambda i, x: seen[i].update(x.movedim(1, -1))):
            for _ in emitted.hidden(site.consumers[-1]):
                pass
        for name, statistics in zip(site.norms, seen, strict=True):
            narrow.settle_norm(self.work.layer(name), statistics.mean(), statistics.variance())

    def _repairs(
        self,
        view: SiteView,
        weight_OH: Tensor,
        reduction: Reduction,
        site: ModuleSite,
        name: str,
        target: Stream,
        emitted: Stream,
    ) -> Callable[[float], Compensation] | None:
        """A consumer's new weight for a ridge, or None where it is only pruned or folded."""
        recipe = self.recipe
        lam = None if recipe.compensate else self.selector.own_ridge(view)
        if not recipe.compensate and lam is None:
            return None
        options = {"form": recipe.ridge_form, "name": f"{site.name}, {name}" if site.readers else site.name}
        sliced = not isinstance(reduction, Folding) and not site.readers
        if sliced and (lam is not None or recipe.one_shot or not self._reads_dense(site)):
            # the compressed vector is a slice of the target: their Gram matrix says all
            return lambda ridge: compensate(weight_OH, view.matrix, reduction, ridge=ridge, lam=lam, **options)
        pairs = HiddenPairs(reduction, device=weight_OH.device, affine=self.affine)
        consumer = self.work.layer(name)
        for number, (target_BXH, z_BXK) in enumerate(zip(target.hidden(name), emitted.hidden(name), strict=True)):
            pairs.update(self._rows(consumer, z_BXK, number), self._rows(consumer, target_BXH, number))
        return lambda ridge: pairs.repair(weight_OH, ridge=ridge, **options)

    @torch.no_grad()
    def _fit_bias(self, name: str, old: _Frozen, new: nn.Module, target: Stream, emitted: Stream) -> None:
        """The bias that keeps the mean output. From outputs, not from means of inputs: where a convolution pads with
        zeros, its output's mean is not the weight's product with its input's."""
        total_O, count = 0.0, 0
        for number, (target_BXH, z_BXK) in enumerate(zip(target.hidden(name), emitted.hidden(name), strict=True)):
            left = (old(target_BXH) - new(z_BXK)).double()
            left = left if self.counted is None else left[self.counted[number]]
            rows_TO = left.movedim(narrow.channel_axis(new), -1).flatten(0, -2)
            total_O, count = total_O + rows_TO.sum(0), count + len(rows_TO)
        if count:
            added_O = total_O / count
            bias_O = added_O if new.bias is None else added_O + new.bias.double()
            narrow.set_bias(new, bias_O)


def _together(found: list[Compensation]) -> Compensation | None:
    """What the repairs of all consumers took: the worst of each, and their mean errors and effective rank."""
    if len(found) < 2:
        return found[0] if found else None
    averaged = ("error_before", "error_after", "effective_rank")
    means = {key: sum(getattr(f, key) for f in found) / len(found) for key in averaged}
    worst = {key: max(getattr(f, key) for f in found) for key in ("lam", "retries", "info")}
    raised = next((f.raised for f in found if f.raised), None)
    return replace(found[0], rcond=min(f.rcond for f in found), raised=raised, **worst, **means)


class _Frozen:
    """A layer as it is now, whatever becomes of it."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.tensors = {name: tensor.detach() for name, tensor in layer.named_parameters()}

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, self.tensors, (x,))
