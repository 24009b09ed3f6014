"""What a run will cost, from shapes alone and a short measured GEMM rate; printed before any work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .machine import gemm_rate
from .pipeline import Job

PROCESS_BYTES = 750 * 10**6
"""Resident memory of a process that has imported torch and transformers (measured, torch 2.15)."""


@dataclass(frozen=True)
class Estimate:
    """Peak resident memory in bytes and wall time in seconds, to within a factor of about two."""

    memory: int
    seconds: float


def estimate(job: Job, tokens: int, evaluation_tokens: int, pruned_too: bool) -> Estimate:
    """Cost of a run on `tokens` calibration tokens; `pruned_too`: the pruned model is made and evaluated as well."""
    evaluations = 3 if pruned_too else 2
    config = job.model.config
    source = job.model.source
    layer = sum(math.prod(source.info(n).shape) for n in source.names() if job.model.layer_of(n) == 0)
    widths = [site.units.width for site in job.sites if site.layer == 0]
    itemsize = job.model.dtype.itemsize
    streams = 3 * config.hidden_size + max(widths)
    held = itemsize * streams * max(tokens, evaluation_tokens)
    solve = 8 * max(widths) ** 2 * 2
    head = 4 * config.vocab_size * config.hidden_size
    memory = PROCESS_BYTES + held + layer * (itemsize + 4) + solve + head
    forward = 2 * layer * job.model.layer_count
    gram = sum(site.units.width**2 for site in job.sites if job.changes(site)) if job.recipe.compensate else 0
    evaluated = evaluation_tokens * evaluations * (forward + 2 * config.vocab_size * config.hidden_size)
    work = tokens * (forward * (1 + pruned_too) + gram) + evaluated
    return Estimate(memory, work / gemm_rate(job.model.device))
