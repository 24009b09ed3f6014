"""What a run will do and cost, worked out before any weight is loaded: `grail plan`, the headline, and `--memory`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from .costs import Costs
from .errors import GrailError
from .machine import available_memory, disk_rate, free_space, gemm_rate, resident_memory
from .numbers import bytes_of
from .recipe import ALPHAS, AUTO
from .session import Session

PROCESS_GROWTH = 160 * 10**6
"""Resident memory that comes with the first use of libraries (thread pools, kernels, file buffers) and that the C
library keeps: what benchmarks/results/memory.jsonl shows beyond the phases, 0.16 GB at both shapes."""
REOPENING = 10.0
"""Seconds of a fresh process that imports torch and transformers and opens a small model."""
SPARE_DISK = 1.05
CACHED_SHARE = 0.05
"""On a CPU activations stay in memory while they take less than this share of what is free; the hidden states between
layers go to disk beside, so that a run can be gone on with."""


@dataclass(frozen=True)
class Plan:
    """How a run will be carried out and what it will need. memory: bytes of resident memory by phase, the process
    included; seconds by phase."""

    session: Session
    costs: Costs
    memory: dict[str, int]
    seconds: dict[str, float]
    store: str
    disk: int

    @property
    def peak(self) -> int:
        """Peak resident memory, bytes."""
        return max(self.memory.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The document of `grail plan --json`."""
        session, job = self.session, self.session.job
        form, after = job.format, _parameters_after(session)
        return {
            "schema_version": 1,
            "model": session.recipe.called or session.located.id,
            "method": session.recipe.method,
            "allocation": session.widths.allocation,
            "layers": job.model.layer_count,
            "sites": _site_kinds(session),
            "widths_settled": not session.widths.needs_scores,
            "parameters": {"before": session.parameters, "after": after},
            "bytes": {"before": session.source_bytes, "after": _bytes_after(session)},
            "calibration_tokens": self.costs.tokens,
            "trial_tokens": self.costs.streamed - self.costs.tokens,
            "target": session.recipe.target if session.recipe.compensate else None,
            "evaluation_tokens": self.costs.evaluated,
            "passes": self.costs.candidates + self.costs.surveyed,
            "chunk_tokens": self.costs.chunk,
            "processes": session.group.size,
            "store": self.store,
            "hidden_states": "spilled" if self.costs.spill else "recomputed",
            "flops": self.costs.flops(),
            "bytes_read": _bytes_read(session, self.costs),
            "bytes_written": _bytes_after(session) * self.costs.candidates,
            "store_traffic_bytes": self.costs.store_traffic(),
            "disk_bytes": self.disk,
            "memory_bytes": self.memory | {"peak": self.peak},
            "seconds": self.seconds | {"total": self.total_seconds},
            "format": form and form.name,
            "loads_with": form and form.loads_with,
        }


def make_plan(session: Session) -> Plan:
    """Choose the store and the chunks so that the memory budget is kept, and predict the rest.

    Raises GrailError when the budget of --memory cannot be kept.
    """
    windows = session.windows.ids.shape if session.windows else (0, 0)
    # of candidates the one that costs most
    job = replace(session.job, recipe=replace(session.recipe, alpha=AUTO)) if session.searches else session.job
    costs = Costs(
        job,
        *(-(-windows[0] // session.group.size), windows[1]),
        -(-(session.evaluated.tokens if session.evaluated else 0) // session.group.size),
        session.chunk_tokens,
        session.spill,
        session.widths.needs_scores,
        session.recipe.compare_pruned and session.recipe.compensate,
        session.evaluated.ids.shape[1] if session.evaluated else 0,
        -(-session.trial_windows // session.group.size),
        session.deciding_windows.numel() if session.widths.measures_errors and session.windows else 0,
        len(ALPHAS) if session.searches else 1,
    )
    base = resident_memory() + PROCESS_GROWTH
    store, kept = _store(session, costs, base)
    costs = _within_budget(session, costs, base + kept)
    memory = {"process": base + kept} | {name: base + kept + bytes for name, bytes in costs.memory().items()}
    disk = _bytes_after(session) * (2 if costs.pruned_too or costs.candidates > 1 else 1)
    disk += costs.store_bytes() * session.group.size if store != "memory" else 0
    return Plan(session, costs, memory, _seconds(session, costs, store), store, disk)


def headline(plan: Plan) -> str:
    """The one line before work."""
    session = plan.session
    changed = sum(map(session.job.touches, session.job.sites))
    tokens = session.windows.tokens if session.windows else 0
    few = session.trial_windows
    beside = f" and {few} window{'s' * (few > 1)} to choose by" if few else ""
    several = f" in {session.group.size} processes" if session.group.size > 1 else ""
    return (
        f"{session.recipe.called or session.located.id}: {session.parameters / 1e6:.1f} M parameters, "
        f"{changed} of {len(session.job.sites)} sites, {tokens:,} calibration tokens{beside}; about "
        f"{plan.peak / 1e9:.1f} GB and {max(plan.total_seconds, 1):.0f} s{several}"
    )


def check_disk(plan: Plan) -> None:
    """Raise GrailError when the output's disk has no room for what is still to be written."""
    out = plan.session.out
    there = sum(file.stat().st_size for file in out.partial.rglob("*") if file.is_file()) if out.resume else 0
    needed, free = max(plan.disk * SPARE_DISK - there, 0), free_space(out.path)
    if needed > free:
        instead = "" if plan.store == "memory" else ", or use --store memory"
        raise GrailError(
            f"--output {out.path}: the run needs about {bytes_of(needed)} of disk, {bytes_of(free)} are free; "
            f"make room, choose another folder{instead}"
        )


def _store(session: Session, costs: Costs, base: int) -> tuple[str, int]:
    """Where activations go, and the bytes of memory that this costs."""
    asked, held = session.recipe.store, costs.store_bytes()
    if asked == "auto" and session.model.device.type != "cpu":
        asked = "memory"
    elif asked == "auto":
        needed = base + held + max(costs.memory().values())
        small = held < CACHED_SHARE * available_memory() and needed <= (session.recipe.memory or needed)
        asked = "cached" if small else "disk"
    return asked, 0 if asked == "disk" else held


def _within_budget(session: Session, costs: Costs, base: int) -> Costs:
    """The same with chunks small enough for --memory."""
    budget = session.recipe.memory
    if budget is None:
        return costs
    chunk, least = max(costs.chunk, costs.evaluation_chunk), max(costs.length, costs.evaluated_length, 1)
    while base + max(costs.memory().values()) > budget and chunk > least:
        chunk = max(chunk // 2, least)
        costs = replace(costs, chunk_tokens=chunk)
    memory = costs.memory()
    largest = max(memory, key=memory.__getitem__)
    if base + memory[largest] > budget:
        plainer = replace(costs, job=replace(session.job, recipe=session.recipe.site_by_site()), trial=0)
        fits = base + max(plainer.memory().values()) <= budget
        raise GrailError(
            f"--memory {bytes_of(budget)} cannot be kept: with one window of {least} tokens at a time this "
            f"run needs {bytes_of(base + memory[largest])} ({largest}; {bytes_of(base)} before any work)"
            f"{'; with --target hidden it would do' if fits else ''}"
        )
    return costs


def _seconds(session: Session, costs: Costs, store: str) -> dict[str, float]:
    """Time by phase from a short measurement of this machine."""
    device, flops = session.model.device, costs.flops()
    rate = gemm_rate(device, session.model.dtype)
    wide = gemm_rate(device, torch.float64) if device.type == "cpu" else gemm_rate(device, torch.float32)
    found = {name: flops[name] / rate for name in ("forward", "gram", "training", "evaluation")}
    found["solve"] = flops["solve"] / wide
    disk = disk_rate(session.out.path.parent)
    found["store"] = costs.store_traffic() / disk if store == "disk" else 0.0
    found["read and write"] = (_bytes_read(session, costs) + _bytes_after(session) * costs.candidates) / disk
    found["reopen"] = REOPENING
    return {name: seconds for name, seconds in found.items() if seconds}


def _bytes_read(session: Session, costs: Costs) -> int:
    """The source once for its hash, once for each pass and each evaluation; candidates are read again to be judged."""
    judged = costs.candidates if costs.candidates > 1 else 0
    passes = 1 + costs.candidates + judged + costs.surveyed + costs.pruned_too
    passes += 2 + costs.pruned_too if costs.evaluated else 0
    return session.source_bytes * passes


def _parameters_after(session: Session) -> int:
    """Before a global allocation has settled the format, without the zeros that one may add."""
    job, found = session.job, session.parameters
    if job.format is not None:
        return found + job.format.numbers_added
    for site in filter(job.changes, job.sites):
        gone = (site.units.per_group - job.kept[site.name]) * site.units.groups
        biases = sum(p.rows_per_unit for p in site.producers if p.name in job.biased_producers(site))
        found -= gone * (session.widths.costs[site.name] + biases)
        if job.affine and f"{site.consumer}.bias" not in job.model.source:
            found += job.model.source.info(f"{site.consumer}.weight").shape[0]
    return found


def _bytes_after(session: Session) -> int:
    """Each tensor in the dtype it is written in, the share of the parameters that stays."""
    source, job = session.model.source, session.job
    infos = [source.info(name) for name in source.names()]
    wide = sum(math.prod(info.shape) * job.written_dtype(info.dtype).itemsize for info in infos)
    return math.ceil(wide * _parameters_after(session) / session.parameters)


def _site_kinds(session: Session) -> dict[str, dict[str, int]]:
    """By kind of site: how many, how many change, widths before and after."""
    found: dict[str, dict[str, int]] = {}
    for site in session.job.sites:
        entry = found.setdefault(site.kind, {"sites": 0, "changed": 0, "before": 0, "after": 0})
        entry["sites"] += 1
        entry["changed"] += session.job.changes(site)
        entry["before"] += site.units.width
        entry["after"] += site.units.groups * session.job.kept[site.name] * site.units.size
    return found


def warn_if_tight(plan: Plan) -> str | None:
    """A sentence when more memory will be needed than there is."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, free = plan.peak * here, available_memory() + resident_memory() * here
    if needed <= free:
        return None
    return f"about {needed / 1e9:.1f} GB of memory will be needed, {free / 1e9:.1f} GB are there"
