"""What a selector is: statistics and weights of one site in, a reduction out. It never sees a model."""

from __future__ import annotations

import zlib
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import GrailError
from ..reduction import Reduction, Selection, Units
from ..statistics import SiteStatistics

PRODUCERS = "producers"


@dataclass
class SiteView:
    """Everything a selector may look at. Shapes: O outputs, H width.

    weight_OH: the consumer's weight; producers: name -> weight [rows, D], filled for selectors that need "producers";
    kept: units to keep in each group.
    """

    name: str
    kind: str
    units: Units
    weight_OH: Tensor
    producers: dict[str, Tensor]
    statistics: SiteStatistics
    kept: int
    seed: int

    def generator(self) -> torch.Generator:
        """A random stream that depends on the seed and the site's name alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))


class Selector:
    """One method. Subclasses set the class variables and `select`; their options are dataclass fields.

    `needs` may hold "diag", "gram" (see statistics) and "producers".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Selector:
        """Build from `--set key=value` pairs; raises GrailError naming an unknown key or a value of a wrong type."""
        known = cls._options()
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in known:
                has = ", ".join(known) or "none"
                raise GrailError(f"--set {key}: method {cls.name} has no such option (it has: {has})")
            kind = type(known[key].default)
            try:
                values[key] = _parse(text, kind)
            except ValueError:
                raise GrailError(f"--set {key}={text}: expected a value of type {kind.__name__}") from None
        return cls(**values)

    @classmethod
    def describe(cls) -> dict:
        """Summary, source, needs, and options with their defaults."""
        options = {name: field.default for name, field in cls._options().items()}
        return {"summary": cls.summary, "source": cls.source, "needs": sorted(cls.needs), "options": options}

    @classmethod
    def _options(cls) -> dict[str, Field]:
        return {field.name: field for field in fields(cls)} if is_dataclass(cls) else {}

    def select(self, site: SiteView) -> Reduction:
        """The site's reduction, keeping `site.kept` units in each group."""
        raise NotImplementedError


class ScoreSelector(Selector):
    """A selector that ranks channels; the score of a head is the sum over its channels, the lowest go."""

    def scores(self, site: SiteView) -> Tensor:
        """Channel scores, float64 [H]."""
        raise NotImplementedError

    def select(self, site: SiteView) -> Selection:
        return keep_best(self.scores(site), site.units, site.kept)


def keep_best(scores_H: Tensor, units: Units, kept: int) -> Selection:
    """Keep the `kept` highest-scoring units of each group; among equals the lower number stays."""
    per_unit = scores_H.view(units.groups, units.per_group, units.size).sum(-1)
    order = per_unit.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(dim=1).values
    chosen = order + torch.arange(units.groups, device=order.device)[:, None] * units.per_group
    return Selection(chosen.flatten().cpu(), units.size, units.width)


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
            raise ValueError(text)
        return text.lower() in {"true", "1", "yes"}
    return kind(text)
