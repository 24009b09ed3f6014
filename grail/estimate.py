"""What a run will cost, from shapes alone and a short measured GEMM rate; printed before any work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .job import Job
from .machine import gemm_rate
from .selectors.base import BLOCK_GRADIENTS
from .statistics import GRAM

PROCESS_BYTES = 750 * 10**6
"""Resident memory of a process that has imported torch and transformers (measured, torch 2.15)."""


BACKWARD = 2
"""A backward pass in forward passes."""
REOPENING = 10.0
"""Seconds of a fresh process that imports torch and transformers and opens a small model."""


@dataclass(frozen=True)
class Estimate:
    """Peak resident memory in bytes and wall time in seconds, to within a factor of about two."""

    memory: int
    seconds: float


def estimate(job: Job, tokens: int, evaluation_tokens: int, pruned_too: bool, surveyed: bool = False) -> Estimate:
    """Cost of a run on `tokens` calibration tokens; `pruned_too`: the pruned model is made and evaluated as well;
    `surveyed`: the dense network is scored in a pass of its own first."""
    evaluations = 3 if pruned_too else 2
    config = job.model.config
    source = job.model.source
    layer = sum(math.prod(source.info(n).shape) for n in source.names() if job.model.layer_of(n) == 0)
    widths = [site.units.width for site in job.sites if site.layer == 0]
    itemsize = job.model.dtype.itemsize
    streams = 3 * config.hidden_size + max(widths)
    held = itemsize * streams * max(tokens, evaluation_tokens)
    # a selector that inverts the Gram matrix holds five float64 matrices of its size (selectors/elimination.py)
    solve = 8 * max(widths) ** 2 * (5 if GRAM in job.selector.needs else 2)
    head = 4 * config.vocab_size * config.hidden_size
    memory = PROCESS_BYTES + held + layer * (itemsize + 4) + solve + head
    gathers = job.recipe.compensate or GRAM in job.selector.needs
    forward = 2 * layer * job.model.layer_count
    gram = sum(site.units.width**2 for site in job.sites if job.changes(site)) if gathers else 0
    evaluated = evaluation_tokens * evaluations * (forward + 2 * config.vocab_size * config.hidden_size)
    scored = forward * (1 + BACKWARD * (BLOCK_GRADIENTS in job.selector.needs))
    work = tokens * ((forward if surveyed else 0) + scored * (1 + pruned_too) + gram) + evaluated
    work += _training(job, tokens, forward) * (1 + pruned_too)
    # a solve is a third of K³ and two triangular ones on at most as many columns, in float64 at half the rate
    work += 2 * sum(2 * site.units.width**3 for site in job.sites if job.changes(site) and job.recipe.compensate)
    return Estimate(memory, work / gemm_rate(job.model.device) + REOPENING)


def _training(job: Job, tokens: int, forward: int) -> float:
    """FLOPs of regional optimisation: forward and backward over some windows, several times, and one more forward."""
    options = job.selector.regional_options()
    if options is None:
        return 0.0
    trained = tokens * min(options.windows / job.recipe.samples, 1.0)
    return forward * ((1 + BACKWARD) * options.passes * trained + tokens)
