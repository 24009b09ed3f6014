"""One pass over a model: what is asked of every site, worked out once. Shapes: O outputs, H width, K kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .families.base import OutputFormat, Site
from .families.decoder import Decoder
from .recipe import Recipe
from .reduction import Reduction
from .selectors import Selector
from .selectors.base import BLOCK_GRADIENTS, PRODUCERS
from .statistics import GRAM


@dataclass
class Job:
    """The model, its sites, how many units each keeps, the method, the recipe's compensation and the output format
    (None: not decided yet, or nothing is written)."""

    model: Decoder
    sites: list[Site]
    kept: dict[str, int]
    selector: Selector
    recipe: Recipe
    format: OutputFormat | None = None

    def changes(self, site: Site) -> bool:
        """Whether something is removed there."""
        return self.kept[site.name] < site.units.per_group

    @property
    def streams(self) -> bool:
        """Whether consumers are repaired towards the dense network's residual stream."""
        return self.recipe.streams

    def touches(self, site: Site) -> bool:
        """Whether the site's consumer gets a new weight: where something is removed, and with the stream for a target
        wherever something was removed before."""
        if not self.streams:
            return self.changes(site)
        return any(self.changes(s) for s in self.sites[: self.sites.index(site) + 1])

    @property
    def affine(self) -> bool:
        """Whether consumers of sites that are touched get a bias."""
        return self.selector.bias if self.recipe.bias is None else self.recipe.bias

    def statistics_of(self, site: Site) -> frozenset[str]:
        """Statistics gathered at a changed site of this kind."""
        wanted = self.selector.needs_of(site.kind) - {PRODUCERS, BLOCK_GRADIENTS}
        folds = self.selector.folds(site.kind)
        folds = folds and (self.changes(site) or not self.streams)
        if (self.recipe.compensate and not folds) or self.selector.updates_weights():
            wanted = wanted | {GRAM}
        return wanted | ({"moments"} if self.affine and not folds else frozenset())

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed at all."""
        if self.selector.regional_options() is not None:
            return any(map(self.changes, self.sites))
        return any(self._needs_data_at(site) for site in self.sites if self.changes(site))

    def _needs_data_at(self, site: Site) -> bool:
        fits = self.recipe.compensate or self.affine
        return fits or bool(self.statistics_of(site)) or BLOCK_GRADIENTS in self.selector.needs_of(site.kind)

    def consumer_weight(self, site: Site) -> Tensor:
        """[O, H] as stored, on the compute device."""
        return self.model.stored(f"{site.consumer}.weight")

    def consumer_bias(self, site: Site) -> Tensor | None:
        """[O] as stored, or None."""
        name = f"{site.consumer}.bias"
        return self.model.source.get(name).to(self.model.device) if name in self.model.source else None

    def producer_rows(self, site: Site) -> dict[str, Tensor]:
        """Each producer's weight [rows, D], its bias as one more column."""
        source, rows = self.model.source, {}
        for producer in site.producers:
            weight = source.get(f"{producer.name}.weight").to(self.model.device)
            if f"{producer.name}.bias" in source:
                bias = source.get(f"{producer.name}.bias").to(weight)
                weight = torch.cat([weight, bias[:, None]], 1)
            rows[producer.name] = weight
        return rows

    def biased_producers(self, site: Site) -> frozenset[str]:
        """Those of them with such a column."""
        return frozenset(p.name for p in site.producers if f"{p.name}.bias" in self.model.source)

    def narrow_producers(self, site: Site, reduction: Reduction) -> dict[str, Tensor]:
        """The producers' tensors after a reduction, by full name, rounded to what is written."""
        lifted_OK = reduction.lift_consumer(self.consumer_weight(site))
        tensors = self.model.narrow(site, reduction, lifted_OK)
        del tensors[f"{site.consumer}.weight"]
        return {name: t.to(self.written_dtype(t.dtype)) for name, t in tensors.items()}

    def written_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that a tensor stored as `stored` is written in."""
        asked = self.recipe.output_dtype
        return getattr(torch, asked) if asked and stored.is_floating_point else stored
