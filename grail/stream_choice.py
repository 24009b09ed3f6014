"""Which α and λ a site of --target stream gets, sweep by sweep: every candidate ridge is solved for, held-out windows
decide (trials.py), and a further sweep goes on from what was chosen (stream_repair.py).

Shapes: H a site's width, K what is kept of it, O outputs of its consumer; B windows, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .compensation import Compensation
from .families.base import Site
from .layer import LayerPass
from .normal_equations import rounded
from .recipe import AUTO
from .reduction import Reduction
from .result import SiteResult, from_main
from .selectors.base import Damping
from .stream_repair import Figures, StreamSolution, StreamSystem
from .trials import RIDGES, TrialErrors, TrialMoments
from .twin import TARGET, WEIGHT


@dataclass
class Prepared:
    """A site before its solve. z: the compressed hidden vectors of a chunk; errors: figures of candidates [O, K]; with
    a bias: base, the mean output that the own repair should have [O], and the means of z [K] and of D [O]; narrow: the
    producers of a folding; damping: what the selection took."""

    reduction: Reduction
    lifted: Tensor
    system: StreamSystem
    z: Callable[[int], Tensor]
    errors: Callable[[list[Tensor]], list[float]]
    base: Tensor | None = None
    mean: Tensor | None = None
    mean_difference: Tensor | None = None
    narrow: dict[str, Tensor] = field(default_factory=dict)
    damping: Damping | None = None

    def biases(self, own_OK: Tensor, stream_OK: Tensor, taken: float) -> tuple[Tensor, Tensor]:
        """(b₀, b₁), float64 [O], of P and S; taken: the share of the mean of D that P makes up for."""
        left = (1 - taken) * self.mean_difference - stream_OK.double() @ self.mean
        return self.bias(own_OK, taken), left

    def bias(self, weight_OK: Tensor, taken: float) -> Tensor:
        """With which the output has its mean, and that share of D's, float64 [O]."""
        return self.base + taken * self.mean_difference - weight_OK.double() @ self.mean


@dataclass
class Choice:
    """The best candidate of a sweep: its α; errors on held-out windows, with α = 0 and with this α (None: nothing was
    to be chosen); in the main process W'(α) [O, K], and how it was solved."""

    alpha: float
    held_out: tuple[float, float] | None
    weight: Tensor | None = None
    solved: Figures | None = None

    @property
    def figures(self) -> tuple[float, float, int, float | None]:
        """α, λ, retries, and the error on held-out windows."""
        return self.alpha, self.solved.lam, self.solved.retries, self.held_out and self.held_out[1]


def repair(run: LayerPass, site: Site, prepared: Prepared) -> SiteResult:
    """The consumer's new weight, which all processes get. A sweep that gains nothing on the held-out windows is the
    last."""
    recipe, dtype = run.job.recipe, run.job.written_dtype(prepared.lifted.dtype)
    between = dtype if recipe.sweeps == 1 else torch.float64
    trial = _trial_moments(run, site, prepared) if recipe.chooses else None
    system, taken = prepared.system, 0.0
    done: list[Choice] = []
    for _ in range(recipe.sweeps):
        found = _best(run, site, prepared, system, taken, trial, between)
        if done and (found.alpha == 0.0 or (trial is not None and found.held_out[1] >= done[-1].held_out[1])):
            break
        done.append(found)
        taken += found.alpha * (1 - taken)
        if len(done) < recipe.sweeps and run.work.group.main:
            system = prepared.system.after(found.weight)

    def finished() -> SiteResult:
        weight_OK, system, bias_O = done[-1].weight, prepared.system, None
        if weight_OK.dtype != dtype:
            weight_OK = rounded(weight_OK.__getitem__, system.weight, weight_OK.shape[1], dtype, site.name)
        compensation = _compensation(weight_OK, done)
        compensation.effective_rank = system.effective_rank
        candidates = [prepared.lifted.to(dtype), weight_OK]
        compensation.error_before, compensation.error_after = prepared.errors(candidates)
        if run.job.affine:
            bias_O = prepared.bias(weight_OK, taken).to(dtype)
        return SiteResult(site, prepared.reduction, compensation, weight_OK, bias_O, prepared.damping)

    return from_main(run.work.group, site, finished)


def _best(
    run: LayerPass,
    site: Site,
    prepared: Prepared,
    system: StreamSystem,
    taken: float,
    trial: TrialMoments | None,
    dtype: torch.dtype,
) -> Choice:
    """Of all candidates of one sweep."""
    recipe, best = run.job.recipe, None
    asked = None if recipe.alpha == AUTO else recipe.alpha
    for ridge in RIDGES if recipe.ridge == AUTO else (recipe.ridge,):
        solution = _solved(run, system, ridge, asked if trial is None else None)
        errors = None if trial is None else _tried(run, site, prepared, solution, taken, trial)
        alpha = asked if asked is not None else errors.best_alpha if system.is_further else errors.cautious_alpha
        held_out = errors and (errors.at(0.0), errors.at(alpha))
        if best is None or held_out[1] < best.held_out[1]:
            best = Choice(alpha, held_out)
            if solution is not None:
                best.weight, best.solved = solution.weight(alpha, dtype), solution.figures
    return best


def _solved(run: LayerPass, system: StreamSystem, ridge: float, alpha: float | None) -> StreamSolution | None:
    """In the main process."""
    if not run.work.group.main:
        return None
    with run.work.profile.phase("solve"):
        return StreamSolution(system, ridge * system.scale, alpha)


def _compensation(weight_OK: Tensor, done: list[Choice]) -> Compensation:
    """With the first sweep's λ and α; retries are those of all. The errors are left at 0."""
    first, last, solved = done[0], done[-1], [choice.solved for choice in done]
    found = Compensation(
        weight_OK, solved[0].lam, sum(s.retries for s in solved), next((s.info for s in solved if s.info), 0),
        min(s.rcond for s in solved), 0.0, 0.0, alpha=first.alpha,
        raised=next((s.raised for s in solved if s.raised), None),
    )  # fmt: skip
    if first.held_out is not None:
        found.held_out = first.held_out[0], last.held_out[1]
    if len(done) > 1:
        found.sweeps = [choice.figures for choice in done]
    return found


def _trial_moments(run: LayerPass, site: Site, prepared: Prepared) -> TrialMoments:
    """Of this process's held-out windows."""
    biased = run.job.affine or run.job.consumer_bias(site) is not None
    shape, windows = (prepared.reduction.kept_width, len(prepared.lifted)), run.chunks.trial_windows
    found = TrialMoments(*shape, device=run.device, biased=biased, windows=windows)
    for number in run.chunks.trial:
        z_BLK, target_BLO = prepared.z(number), run.take(TARGET, number)
        weight_BL = run.take(WEIGHT, number) * run.chunks.weights.get(number, torch.ones(())).to(run.device)
        with run.work.profile.phase("trials"):
            found.update(z_BLK, target_BLO, weight_BL)
    return found


def _tried(
    run: LayerPass, site: Site, prepared: Prepared, solution: StreamSolution | None, taken: float, trial: TrialMoments
) -> TrialErrors:
    """How P and S do on the held-out windows of all processes."""
    group = run.work.group
    own_OK, stream_OK = (
        group.broadcast_tensor(rows(slice(None)).float() if solution else None)
        for rows in (solution and solution.own, solution and solution.stream)
    )
    biases = (None, None)
    if run.job.affine:
        biases = tuple(bias_O.float() for bias_O in prepared.biases(own_OK, stream_OK, taken))
    elif (own_O := run.job.consumer_bias(site)) is not None:
        biases = (own_O.float(), None)
    with run.work.profile.phase("trials"):
        found = trial.errors((own_OK, biases[0]), (stream_OK, biases[1]))
    return found.sum_over(group)
