"""--target stream at one site of a network in memory: its consumer also makes up for what the sites before got wrong.

Beside the compressed network runs the dense one. With r_d and r_c their residual streams before the consumer's output
is added, y_d and y_c what the consumer makes in either (before this site is narrowed), and a the scale of every channel
on the way to the stream (addition.py), the consumer should make y_c + α D,

    D = y_d − y_c + (r_d − r_c) / a,        W'(α) = P + α S,        S = Σ D zᵀ (Σ z zᵀ + λI)⁻¹:

P is the repair with --target own, z what the compressed consumer reads, all taps of a convolution as one row. There P
is one map for all taps, which knows nothing of how they go together and can be worse than none; so S takes on what it
leaves as well: y_c − P z + D stands in the place of D. Channels whose scale is next to nothing cannot be corrected:
their D is 0. α and the ridge are chosen on inputs that enter no statistic (trials.py), by errors in the stream. Sites
from which nothing is removed are not solved anew.

Shapes: O channels of the stream, X = K · taps inputs of an output; T tokens or positions that the consumer writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compensation import Compensation, compensate_pairs
from ..families.network import ModuleSite
from ..moments import CrossMoments, PairStatistics
from ..normal_equations import share_of
from ..recipe import AUTO
from ..trials import RIDGES, TrialErrors, TrialMoments, importance
from . import narrow
from .addition import scale_of
from .recipe import ModuleRecipe
from .stream import Stream

NO_SCALE = 1e-3
"""A channel with less of the median channel's scale takes no part."""
PIECE = 2**26
"""Numbers of z that are there at once, at most (one input's at least)."""


class Rows(NamedTuple):
    """z [T, X], y_c and D [T, O], how much a row counts in a choice [T]: 1 / mean((r + a y + b)²) of the larger stream;
    and a [O]."""

    z: Tensor
    own: Tensor
    difference: Tensor
    weight: Tensor
    scale: Tensor


@dataclass
class Beside:
    """The same inputs at a site in three networks: the dense one, the compressed one as it was before the site, and the
    one whose producers are narrow. counted: tokens that count, bool [B, L] (None: all)."""

    site: ModuleSite
    dense: Stream
    own: Stream
    narrowed: Stream
    counted: list[Tensor] | None = None

    @property
    def consumer(self) -> nn.Module:
        """The layer whose weight is sought."""
        return self.narrowed.network.layer(self.site.consumer)

    def rows(self) -> Iterator[Rows]:
        """Of all inputs that count, some at a time."""
        site, layer = self.site, self.consumer
        each = zip(self.dense.added(site), self.own.added(site), self.narrowed.hidden(site.consumer), strict=True)
        for number, (dense, own, hidden) in enumerate(each):
            scale_O, shift_O = scale_of(self.dense.network, site, dense[0])
            taking_part_O = scale_O.abs() > NO_SCALE * scale_O.abs().median()
            inverse_O = torch.where(taking_part_O, 1 / scale_O, 0.0)
            hidden, *others = (narrow.batched(layer, tensor) for tensor in (hidden, *dense, *own))
            for some in _pieces(layer, hidden):
                made_d, before_d, made_c, before_c = (
                    self._counted(narrow.outputs_of(layer, tensor[some]).float(), number, some) for tensor in others
                )
                z_TX = self._counted(narrow.patches_of(layer, hidden[some]), number, some)
                difference_TO = (made_d - made_c) * taking_part_O + (before_d - before_c) * inverse_O
                streams = (b + scale_O * made + shift_O for b, made in ((before_d, made_d), (before_c, made_c)))
                yield Rows(z_TX, made_c, difference_TO, importance(*streams), scale_O)

    def _counted(self, rows: Tensor, number: int, some: slice) -> Tensor:
        return rows.flatten(0, -2) if self.counted is None else rows[self.counted[number][some]]


def _pieces(layer: nn.Module, hidden: Tensor) -> list[slice]:
    """Of a batch of the consumer's inputs."""
    taps = narrow.taps_of(layer)
    step = max(PIECE // max(taps * hidden[0].numel(), 1), 1)
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


class Moments:
    """Σ z zᵀ, Σ z Dᵀ and Σ z (y_c + D)ᵀ of calibration rows, about the means where a bias is fitted; bias_O: what the
    consumer adds to every output (None: nothing); `scale`: a [O]."""

    def __init__(self, beside: Beside, bias_O: Tensor | None, *, affine: bool):
        self.bias = bias_O
        for rows in beside.rows():
            self.scale = rows.scale
            if not hasattr(self, "difference"):
                sizes = rows.z.shape[1], rows.own.shape[1]
                self.difference = PairStatistics(*sizes, device=rows.z.device, affine=affine)
                self.target = CrossMoments(self.difference.accumulator, sizes[1], affine=affine)
            target_TO = rows.own + rows.difference
            self.difference.update(rows.z, target_TO, rows.difference)
            self.target.update(rows.z, target_TO, target_TO if bias_O is None else target_TO - bias_O)

    def correction(self, own_OX: Tensor | None, ridge: float, name: str) -> Compensation:
        """S [O, X] and, where a bias is fitted, its own: b₁ [O], float64. own_OX: P, if S takes on what that leaves."""
        normal = self.difference.normal
        pairs = self.difference if own_OX is None else self.target.less(own_OX, normal)
        nothing_OX = torch.zeros(
            self.difference.cross.shape[1], normal.width, dtype=torch.float64, device=normal.device
        )
        found = compensate_pairs(nothing_OX, pairs, ridge=ridge, name=name)
        if found.bias is not None:
            found.bias = self.difference.mean_difference - found.weight @ self.difference.mean
        return found

    def own_bias(self, own_OX: Tensor) -> Tensor:
        """b₀ [O] float64: with it P z has the mean of y_c."""
        mean_O = self.target.mean_difference - self.difference.mean_difference
        return (mean_O if self.bias is None else mean_O + self.bias.double()) - own_OX @ self.target.mean

    def error(self, weight_OX: Tensor) -> float:
        """Σ‖y_c + D − W' z − b'‖² / Σ‖y_c + D‖², with its best bias where one is fitted: both sums
        are then about the means."""
        gained = 2 * torch.sum(weight_OX.mT * self.target.cross.double()).item()
        left = self.target.difference_energy - gained + self.difference.normal.quadratic_trace(weight_OX)
        return share_of(left, self.target.target_energy)


@dataclass
class Candidate:
    """For one ridge: P and S as [O, X] with their biases (None: none is fitted), and their errors on trial inputs."""

    own: Compensation
    correction: Compensation
    own_OX: Tensor
    own_bias: Tensor | None
    errors: TrialErrors | None = None

    def judge(self, trial: TrialMoments, scale_O: Tensor, bias_O: Tensor | None) -> None:
        """By what reaches the stream; bias_O: the one that stays where none is fitted."""
        first = bias_O if self.own_bias is None else self.own_bias
        pairs = (self.own_OX, first), (self.correction.weight, self.correction.bias)
        scaled = [(scale_O[:, None] * w, None if b is None else scale_O * b) for w, b in pairs]
        self.errors = trial.errors(*scaled)

    def at(self, alpha: float) -> tuple[Tensor, Tensor | None]:
        """W'(α) [O, X] and its bias [O], float64."""
        bias_O = None if self.own_bias is None else self.own_bias + alpha * self.correction.bias
        return self.own_OX + alpha * self.correction.weight, bias_O


def repair(
    beside: Beside,
    trial: Beside | None,
    own: Callable[[float], Compensation],
    lifted_OK: Tensor,
    recipe: ModuleRecipe,
    *,
    affine: bool,
) -> Compensation:
    """The consumer's new weight in the layout of `narrow.consumer_matrix`, and its bias where one is fitted; None with
    α = 0, where it is that of --target own. own: P for a ridge, lifted_OK: W B0, both in that layout; trial: inputs to
    choose by, where there is anything to choose. Raises GrailError naming the site where no λ makes the system
    solvable."""
    layer = beside.consumer
    bias_O = None if layer.bias is None else layer.bias.detach().float()
    moments = Moments(beside, bias_O, affine=affine)
    held = None if trial is None else _held(trial, affine or bias_O is not None)
    best: tuple[float, float, Candidate] | None = None
    for ridge in RIDGES if recipe.ridge == AUTO else (recipe.ridge,):
        candidate = _candidate(layer, moments, own(ridge), ridge, beside.site.name, affine)
        if held is not None:
            candidate.judge(held, moments.scale, bias_O)
        alpha = candidate.errors.best_alpha if recipe.alpha == AUTO else float(recipe.alpha)
        value = 0.0 if held is None else candidate.errors.at(alpha)
        if best is None or value < best[0]:
            best = value, alpha, candidate
    return _finished(layer, moments, *best[1:], narrow.to_patches(layer, lifted_OK.double()))


def _held(trial: Beside, biased: bool) -> TrialMoments:
    """Moments of the inputs that decide, targets as they reach the stream."""
    found = None
    for rows in trial.rows():
        if found is None:
            found = TrialMoments(rows.z.shape[1], rows.own.shape[1], device=rows.z.device, biased=biased)
        found.update(rows.z, rows.scale * (rows.own + rows.difference), rows.weight)
    return found


def _candidate(
    layer: nn.Module, moments: Moments, own: Compensation, ridge: float, name: str, affine: bool
) -> Candidate:
    own_OX = narrow.to_patches(layer, own.weight.double())
    own_bias = moments.own_bias(own_OX) if affine else None
    several = narrow.taps_of(layer) > 1
    return Candidate(own, moments.correction(own_OX if several else None, ridge, name), own_OX, own_bias)


def _finished(layer: nn.Module, moments: Moments, alpha: float, chosen: Candidate, lifted_OX: Tensor) -> Compensation:
    weight_OX, bias_O = chosen.at(alpha)
    solved = chosen.own, chosen.correction
    return replace(
        chosen.own,
        weight=narrow.from_patches(layer, weight_OX),
        bias=bias_O if alpha else None,
        retries=max(each.retries for each in solved),
        raised=next((each.raised for each in solved if each.raised), None),
        stream_lam=chosen.correction.lam,
        info=max(each.info for each in solved),
        rcond=min(each.rcond for each in solved),
        error_before=moments.error(lifted_OX),
        error_after=moments.error(weight_OX),
        alpha=alpha,
        held_out=chosen.errors and (chosen.errors.at(0.0), chosen.errors.at(alpha)),
    )
