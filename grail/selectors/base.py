"""What a selector is: statistics and weights of one site in, a reduction out. It never sees a model."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from grail_kernels import PackedSymmetric

from ..errors import GrailError
from ..numbers import as_whole, plain
from ..reduction import Reduction, Selection, Units
from ..statistics import SiteStatistics

PRODUCERS = "producers"
BLOCK_GRADIENTS = "block_gradients"
ROWS = 256


class Damping(NamedTuple):
    """λ that a method added to the Gram matrix to select by it: as its option asks for, as used, and how often it was
    raised."""

    asked: float
    lam: float
    retries: int

    @property
    def raised(self) -> tuple[float, float] | None:
        """λ as asked and as used, where that is another."""
        return (self.asked, self.lam) if self.retries else None

    def refuse_raised(self, name: str) -> None:
        """Raises GrailError naming the site where λ had to be raised: what --strict asks for."""
        if self.retries:
            raise GrailError(
                f"{name}: the matrix that the method selects by is singular with λ = {self.asked:.3g}, and it took "
                f"{self.lam:.3g}; use more calibration text or more --set damping=..., or leave out --strict"
            )


@dataclass
class SiteView:
    """Everything a selector may look at. Shapes: O outputs, H width, D inputs of a producer.

    weight_OH: the consumer's weight; producers: name -> [rows, D], a bias as one more column, filled for selectors that
    need "producers"; biased: the names of those that have such a column; gradients_OH: for those that need
    "block_gradients", RMS over calibration windows of ∂‖f(X)‖₂/∂weight for the block f; kept: units to keep in each
    group; windows: number of calibration windows; affine: whether the repair fits a bias too, so that the exact
    objective is the centred one; damping: noted by selectors that use one.
    """

    name: str
    kind: str
    units: Units
    weight_OH: Tensor
    producers: dict[str, Tensor]
    statistics: SiteStatistics
    kept: int
    seed: int
    gradients_OH: Tensor | None = None
    windows: int = 1
    affine: bool = False
    biased: frozenset[str] = frozenset()
    damping: Damping | None = None

    @property
    def matrix(self) -> PackedSymmetric:
        """The Gram matrix that the repair is solved with: about the mean where a bias is fitted along."""
        return self.statistics.scatter if self.affine else self.statistics.gram

    def note(self, damping: Damping) -> None:
        """What a selection took, for the report."""
        self.damping = damping

    def generator(self) -> torch.Generator:
        """A random stream that depends on the seed and the site's name alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.name}".encode()))


@dataclass(frozen=True)
class RegionalOptions:
    """Regional optimisation after a block was compressed: passes over `windows` calibration windows."""

    passes: int
    windows: int
    learning_rate: float


class Selector:
    """One method. Subclasses set the class variables and `select`; their options are dataclass fields.

    `needs` may hold "diag", "moments", "gram" (see statistics), "producers" and "block_gradients"; `allocation` is the
    method's own rule of how much goes where, unless --allocation names another; `bias` whether the method fits a bias
    unless --no-bias is given.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    allocation: ClassVar[str] = "uniform"
    bias: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Selector:
        """Build from `--set key=value` pairs, values as text or as Python has them; raises GrailError naming an unknown
        key or a value of a wrong type."""
        known = cls._options()
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in known:
                has = ", ".join(known) or "none"
                raise GrailError(f"--set {key}: method {cls.name} has no such option (it has: {has})")
            kind = type(known[key].default)
            try:
                values[key] = _parse(text, kind)
            except (ValueError, TypeError, AttributeError, OverflowError):
                raise GrailError(f"--set {key}={text}: expected a value of type {kind.__name__}") from None
        return cls(**values)

    @classmethod
    def describe(cls) -> dict:
        """Summary, source, needs, allocation, and options with their defaults."""
        options = {name: field.default for name, field in cls._options().items()}
        return {
            "summary": cls.summary,
            "source": cls.source,
            "needs": sorted(cls.needs),
            "allocation": cls.allocation,
            "options": options,
        }

    @classmethod
    def _options(cls) -> dict[str, Field]:
        return {field.name: field for field in fields(cls)} if is_dataclass(cls) else {}

    def needs_of(self, kind: str) -> frozenset[str]:
        """What is needed at sites of a kind, "heads" or "channels"."""
        return self.needs

    def own_allocation(self) -> str:
        """The allocation when none is asked for."""
        return self.allocation

    def folds(self, kind: str) -> bool:
        """Whether sites of this kind are folded rather than selected from."""
        return False

    def updates_weights(self) -> bool:
        """Whether the method's own weight update is kept where there is no compensation (see `own_ridge`)."""
        return False

    def fixed_heads(self) -> int | None:
        """How many heads of the whole network go, where the method fixes that."""
        return None

    def regional_options(self) -> RegionalOptions | None:
        """How each compressed block is trained towards the dense one; None: not at all."""
        return None

    def select(self, site: SiteView) -> Reduction:
        """The site's reduction, keeping `site.kept` units in each group."""
        raise NotImplementedError

    def global_scores(self, site: SiteView) -> Tensor:
        """Unit scores, float64 [U], that can be compared between sites: for an allocation over the whole network.

        Raises GrailError for a method that ranks nothing.
        """
        raise GrailError(f"--allocation global: method {self.name} gives no scores; use --allocation uniform or log")

    def own_ridge(self, site: SiteView) -> float | None:
        """The absolute λ of a weight update that belongs to the method itself, made even without compensation."""
        return None


class ScoreSelector(Selector):
    """A selector that ranks channels; the score of a head is the sum over its channels, the lowest go."""

    def scores(self, site: SiteView) -> Tensor:
        """Channel scores, float64 [H]."""
        raise NotImplementedError

    def select(self, site: SiteView) -> Selection:
        return keep_best(self.scores(site), site.units, site.kept)

    def global_scores(self, site: SiteView) -> Tensor:
        """z-scores over the site's channels, the mean of each unit (FLAP, An et al., AAAI 2024)."""
        return standardised(self.scores(site)).view(site.units.count, site.units.size).mean(1)


def column_sums(weight_OH: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ over outputs of term(weight), float64 [H], a block of rows at a time: no float64 copy of the whole weight."""
    total_H = weight_OH.new_zeros(weight_OH.shape[1], dtype=torch.float64)
    for block_BH in weight_OH.split(ROWS):
        total_H += term(block_BH.double()).sum(0)
    return total_H


def standardised(scores: Tensor) -> Tensor:
    """(scores - mean) / standard deviation, float64; 0 where all are equal."""
    centred = scores.double() - scores.double().mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else centred


def keep_best(scores_H: Tensor, units: Units, kept: int) -> Selection:
    """Keep the `kept` highest-scoring units of each group; among equals the lower number stays."""
    per_unit = scores_H.view(units.groups, units.per_group, units.size).sum(-1)
    order = per_unit.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(dim=1).values
    chosen = order + torch.arange(units.groups, device=order.device)[:, None] * units.per_group
    return Selection(chosen.flatten().cpu(), units.size, units.width)


def _parse(text: Any, kind: type) -> Any:
    """A value as the option has it: from text, or given in Python. Raises ValueError for one of another type."""
    if not isinstance(text, str):
        found = text if kind in (bool, str) else as_whole(text) if kind is int else plain(text)
        if type(found) is kind or (kind is float and type(found) is int):
            return kind(found)
        raise ValueError(text)
    if kind is bool:
        if text.lower() not in {"true", "false", "1", "0", "yes", "no"}:
            raise ValueError(text)
        return text.lower() in {"true", "1", "yes"}
    return kind(text)
