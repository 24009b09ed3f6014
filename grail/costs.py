"""What a pass over a model needs, from shapes alone: memory by phase, floating-point operations, bytes moved.

Shapes: D hidden size, H a site's width, K kept of it, O outputs of its consumer, c tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from grail_kernels.packed import default_tile, packed_size

from .compensation import ALLOCATOR, solve_bytes, solve_flops
from .families.base import Site
from .job import Job
from .normal_equations import CPU_ROWS
from .recipe import AUTO
from .selectors.base import BLOCK_GRADIENTS
from .statistics import GRAM
from .survey import SHARES
from .trials import RIDGES

PROBE_TOKENS = 64
LOGIT_COPIES = 3
"""Logits of one block of rows, their exponentials and their softmax."""
ATTENTION_COPIES = 4
"""Queries, keys and values as projected, rotated and laid out for the attention, and its output."""
MLP_COPIES = 3
"""Gate and up projections and their product (or the activation), alive at once."""
BACKWARD = 2
"""A backward pass in forward passes."""
ELIMINATION_COPIES = 5
"""float64 matrices of a site's width that an elimination keeps (selectors/elimination.py)."""
TRAINING_COPIES = 6
"""float32 copies of a layer during regional optimisation: used, leaves, gradients, Adam's two, and the trained ones."""


@dataclass(frozen=True)
class Costs:
    """Costs of a run. windows, length: of the calibration text (0, 0 without); evaluated, evaluated_length: tokens of
    the evaluation text and of one of its windows (0, 0 without); chunk_tokens, spill: as in Workspace; surveyed: the
    dense network is scored in a pass of its own; pruned_too: the pruned network is made and evaluated beside; trial:
    windows of calibration text that only decide between candidates; deciding: tokens that go on through the dense
    layers after each site that is compressed alone, for an allocation by errors; candidates: whole runs that are made,
    of which one is kept."""

    job: Job
    windows: int
    length: int
    evaluated: int
    chunk_tokens: int
    spill: bool
    surveyed: bool = False
    pruned_too: bool = False
    evaluated_length: int = 0
    trial: int = 0
    deciding: int = 0
    candidates: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that enter the statistics."""
        return self.windows * self.length

    @property
    def streamed(self) -> int:
        """Tokens that go through the network while it is compressed."""
        return (self.windows + self.trial) * self.length

    @cached_property
    def _sizes(self) -> dict[str, int]:
        source = self.job.model.source
        return {name: math.prod(source.info(name).shape) for name in source.names()}

    @cached_property
    def _by_prefix(self) -> dict[str, int]:
        """Parameters of all tensors whose names begin with a prefix that ends in a dot."""
        found: Counter[str] = Counter()
        for name, size in self._sizes.items():
            parts = name.split(".")
            for end in range(1, len(parts)):
                found[".".join(parts[:end]) + "."] += size
        return dict(found)

    def _numel(self, prefix: str) -> int:
        return self._by_prefix.get(prefix, 0)

    @property
    def _item(self) -> int:
        return self.job.model.dtype.itemsize

    def _stored(self, site: Site) -> int:
        return self.job.model.source.info(f"{site.consumer}.weight").dtype.itemsize

    def _part(self, site: Site) -> tuple[int, int]:
        """Parameters of a site's branch without its consumer, and of its consumer."""
        consumer = self._numel(f"{site.consumer}.")
        return self._numel(f"{self.job.model.prefix(site.layer)}{self.job.model.part_of(site)}.") - consumer, consumer

    def _kept(self, site: Site) -> int:
        return site.units.groups * self.job.kept[site.name] * site.units.size

    @property
    def chunk(self) -> int:
        """Tokens of the largest chunk of calibration text (or of the probe)."""
        return max(self._chunk(self.windows, self.length), PROBE_TOKENS)

    @property
    def evaluation_chunk(self) -> int:
        """Tokens of the largest chunk of text that is evaluated; 0 without."""
        length = self.evaluated_length
        judged = self._chunk(self.trial, self.length) if self.candidates > 1 else 0
        return max(self._chunk(self.evaluated // length, length) if length else 0, judged)

    def _chunk(self, windows: int, length: int) -> int:
        return min(max(self.chunk_tokens // max(length, 1), 1), windows) * length

    def activations(self, site: Site, chunk: int) -> int:
        """Bytes alive at once while a chunk goes through a branch up to its consumer's input."""
        hidden = self.job.model.config.hidden_size
        rows = self._part(site)[0] // hidden
        if site.kind == "heads":
            inner = ATTENTION_COPIES * max(rows, site.units.width)
        else:
            inner = MLP_COPIES * site.units.width
        return self._item * chunk * (3 * hidden + inner)

    def statistics(self, site: Site) -> int:
        """Bytes of what is accumulated at a site."""
        width = site.units.width
        needs = self.job.statistics_of(site)
        if GRAM not in needs:
            return 16 * width
        tile = default_tile(width, self.job.model.device)
        return 4 * packed_size(width, tile, padded=self.job.model.device.type != "cpu") + self._cross(site)

    def _cross(self, site: Site) -> int:
        """Bytes of the cross moment with the residual stream."""
        return 4 * self._part(site)[1] if self.job.streams and self.job.touches(site) else 0

    def memory(self) -> dict[str, int]:
        """Bytes beside those of the process itself, by phase, of the layer where that phase needs most."""
        found: Counter[str] = Counter()

        def at_least(phase: str, needed: int) -> None:
            found[phase] = max(found[phase], needed)

        for layer in range(self.job.model.layer_count):
            narrow = 0  # tensors of the layer that wait for being written
            for site in (s for s in self.job.sites if s.layer == layer):
                inner, consumer = self._part(site)
                weights = self._item * inner
                name = "attention" if site.kind == "heads" else "mlp"
                changed = self.job.touches(site)
                gathers = bool(self.windows) and (changed or self.surveyed)
                statistics = self.statistics(site) if gathers else 0
                beside = self._beside(site) if changed else 0
                forward = weights + self.activations(site, self.chunk) + statistics + beside
                at_least(f"{name}: forward", forward + narrow)
                if changed:
                    held = 0 if self.spill else weights
                    at_least(f"{name}: solve", self._solve(site) + statistics + held + narrow)
                    narrow += self._stored(site) * self._narrow(site)
                after = self._item * consumer * self._kept(site) // site.units.width
                chunk = self._item * self.chunk * (4 * self.job.model.config.hidden_size + 2 * site.units.width)
                at_least(f"{name}: apply", after + chunk + narrow)
            if self.job.selector.regional_options() or BLOCK_GRADIENTS in self.job.selector.needs:
                at_least("regional training", self._training(layer))
        at_least("head", self._head())
        if self.evaluated or self.candidates > 1:
            at_least("evaluation", self._evaluation())
        return dict(found)

    def _beside(self, site: Site) -> int:
        """Bytes alive in a forward pass beside the branch itself where the dense stream runs too: the consumer as it
        is, t and what it is made of."""
        if not self.job.streams:
            return 0
        outputs = self._part(site)[1] // site.units.width
        return self._item * self._part(site)[1] + (4 + 3 * self._item) * self.chunk * outputs

    def _solve(self, site: Site) -> int:
        """Selection and repair of one site: the larger of the two, and the consumer as stored."""
        width, kept = site.units.width, self._kept(site)
        outputs = self._part(site)[1] // width
        needed = 0
        if self.job.selector.folds(site.kind):
            # pairs: their moments, the dense consumer and its anchor in float32, then the solve and its right-hand side
            needed = 4 * (kept**2 // 2 + 2 * kept * outputs + width * outputs) + 8 * kept**2 + 16 * kept * outputs
        elif self.job.streams:
            sides = 1 + (self.job.recipe.alpha == AUTO)
            # A, a side [K, O] for each part of the solution, the dense weight as float64 rows, and the best so far
            needed = 8 * kept**2 + 8 * sides * kept * outputs + 8 * width * min(outputs, CPU_ROWS) + ALLOCATOR
            needed += self._stored(site) * kept * outputs + 4 * sides * kept * outputs
            if self.job.recipe.sweeps > 1:  # the best so far is float64, and so is what the next sweep starts from
                needed += (16 - self._stored(site)) * kept * outputs
            needed += (2 * kept**2 + 4 * kept * outputs) * self.job.recipe.chooses  # moments of held-out windows
        elif self.job.recipe.compensate or self.job.selector.updates_weights():
            needed = solve_bytes(outputs, width, kept)
            if self.job.recipe.ridge_form == "paper":
                needed += 8 * kept * max(outputs - (width - kept), 0)
        if GRAM in self.job.selector.needs_of(site.kind):
            needed = max(needed, 8 * ELIMINATION_COPIES * width**2)
        return needed + self._stored(site) * outputs * width

    def _narrow(self, site: Site) -> int:
        """Parameters of the site's tensors after the reduction."""
        rows = sum(self._numel(f"{producer.name}.") for producer in site.producers)
        return (rows + self._part(site)[1]) * self._kept(site) // site.units.width

    def _training(self, layer: int) -> int:
        options = self.job.selector.regional_options()
        windows = min(options.windows, self.windows) if options else 0
        hidden = self.job.model.config.hidden_size
        graph = 4 * self.length * max(self.activations(s, 1) // self._item for s in self.job.sites) * 2
        copies = 4 * TRAINING_COPIES * self._numel(self.job.model.prefix(layer))
        return copies + 2 * self._item * windows * self.length * hidden + graph

    def _head(self) -> int:
        config, source = self.job.model.config, self.job.model.source
        stored = source.info("model.embed_tokens.weight").dtype.itemsize
        wide = self._item if self._item != stored else 0
        return config.vocab_size * config.hidden_size * (stored + max(wide, 1))

    def _evaluation(self) -> int:
        config = self.job.model.config
        layer = max(self._numel(self.job.model.prefix(i)) for i in range(self.job.model.layer_count))
        run = self._item * layer + max(self.activations(site, self.evaluation_chunk) for site in self.job.sites)
        logits = 4 * LOGIT_COPIES * 512 * config.vocab_size + self._head()
        return max(run, logits)

    def flops(self) -> dict[str, float]:
        """Floating-point operations: float32 (or the compute dtype's) and, for solves, float64."""
        job, config = self.job, self.job.model.config
        token = self._token_flops(self.length)
        backward = BACKWARD * (BLOCK_GRADIENTS in job.selector.needs)
        last = max((site.layer + 1 for site in job.sites if job.touches(site)), default=0)
        through = token * last / job.model.layer_count
        found = {
            "forward": through * (self.streamed + backward * self.tokens),
            "gram": self.tokens * sum(s.units.width**2 for s in job.sites if self._grams(s)) * 1.0,
            "solve": sum(map(self._solve_flops, job.sites)),
            "training": self._training_flops(token),
        }
        solved_once = found["solve"]
        if job.streams:  # the dense network beside, the cross moment, and moments of the held-out windows
            found["forward"] += through * self.streamed
            for site in filter(job.touches, job.sites):
                consumer, kept = self._part(site)[1], self._kept(site)
                found["gram"] += 2.0 * consumer * self.tokens
                found["gram"] += self.trial * self.length * kept * (kept + 2.0 * consumer / site.units.width)
        found = {name: flops * self.candidates for name, flops in found.items()}
        found["forward"] += through * self.tokens * (self.surveyed + self.pruned_too * (1 + backward))
        if self.deciding:  # a copy for each site, through half of the layers on the average; a solve for each width
            found["forward"] += token / 2 * self.deciding * len(job.sites)
            found["solve"] += solved_once * len(SHARES)
        head = 2.0 * config.vocab_size * config.hidden_size
        found["evaluation"] = self.evaluated * (2 + self.pruned_too) * (self._token_flops(self.evaluated_length) + head)
        if self.candidates > 1:
            found["evaluation"] += self.candidates * self.trial * self.length * (token + head)
        return found

    def _token_flops(self, length: int) -> float:
        """Of one token through all layers: what meets weights, and attention over a window of so many."""
        weights = sum(self._numel(self.job.model.prefix(i)) for i in range(self.job.model.layer_count))
        heads = sum(site.units.width for site in self.job.sites if site.kind == "heads")
        return 2.0 * weights + 4.0 * length * heads

    def _grams(self, site: Site) -> bool:
        return self.job.touches(site) and GRAM in self.job.statistics_of(site)

    def _solve_flops(self, site: Site) -> float:
        if not (self.job.touches(site) and self.job.recipe.compensate):
            return 0.0
        width, kept = site.units.width, self._kept(site)
        outputs = self._part(site)[1] // width
        own = 2.0 * width**3 if GRAM in self.job.selector.needs_of(site.kind) and self.job.changes(site) else 0.0
        if not self.job.streams:
            return solve_flops(outputs, width, kept) + own
        recipe = self.job.recipe
        sides = 1 + (recipe.alpha == AUTO)
        each = kept**3 / 3 + 2.0 * kept**2 * sides * outputs + 2.0 * outputs * (width - kept) * kept
        each += 3.0 * kept**2 * outputs * recipe.chooses
        own += 2.0 * width**2 * outputs
        # a further sweep has one right-hand side, and takes from it what there is already
        again = kept**3 / 3 + (2.0 + 3.0 * recipe.chooses) * kept**2 * outputs
        candidates = len(RIDGES) if recipe.ridge == AUTO else 1
        own += (recipe.sweeps - 1) * (candidates * again + 2.0 * candidates * kept**2 * outputs)
        return each * candidates + own

    def _training_flops(self, layer_flops: float) -> float:
        options = self.job.selector.regional_options()
        if options is None:
            return 0.0
        trained = self.tokens * min(options.windows / max(self.windows, 1), 1.0)
        return layer_flops * ((1 + BACKWARD) * options.passes * trained + self.tokens)

    def store_bytes(self) -> int:
        """The most that lies in the store at a time: two streams, a branch, and the spilled inputs of a consumer."""
        widest = max(site.units.width for site in self.job.sites)
        hidden = self.job.model.config.hidden_size
        each = 3 * hidden + (widest if self.spill else 0)
        streamed = self._item * max(self.tokens, 1) * each if self.windows else 0
        if self.job.streams:  # of the dense network two streams and a branch; targets in float32, where they are kept
            folds = any(self.job.selector.folds(site.kind) for site in self.job.sites)
            streamed += self._item * self.trial * self.length * each + 3 * self._item * self.streamed * hidden
            streamed += 4 * hidden * (self.streamed if folds else self.trial * self.length)
        copies = self._item * 2 * hidden * self.deciding * len(self.job.sites)
        return max(streamed + copies, self._item * self.evaluated * self.job.model.config.hidden_size)

    def store_traffic(self) -> int:
        """Bytes written into the store and read from it again, over the whole run."""
        hidden, layers = self.job.model.config.hidden_size, self.job.model.layer_count
        widths = sum(site.units.width for site in self.job.sites if self.job.changes(site)) * self.spill
        judged = self.candidates * self.trial * self.length if self.candidates > 1 else 0
        passes = self.candidates * (1 + self.job.streams) + self.surveyed + self.pruned_too
        return self._item * (
            self.tokens * passes * (7 * hidden * layers + 2 * widths)
            + 2 * (self.evaluated * (2 + self.pruned_too) + judged) * hidden * layers
        )
