"""What a run did: data first. `Report.to_json` is grail.json; times and host go to run.json alone."""

from __future__ import annotations

import math
import platform
import socket
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .families.base import WrittenFormat
from .machine import peak_memory
from .profile import Profile
from .readable import Readable
from .recipe import Recipe
from .result import SiteResult
from .training import Training
from .widths import WidthPlan

SWEEP = ("alpha", "lambda", "retries", "held_out_error")
SCHEMA_VERSION = 1
PACKAGES = ("grail-compress", "torch", "transformers", "safetensors")


@dataclass(repr=False)
class Report(Readable):
    """The result of one compression. `output` is the folder written; `model` the narrower module when a module was
    given. `parameters` and `bytes` are (before, after); `evaluation` holds perplexities by name; `candidates`
    those of --alpha search (AlphaSearch.to_json); `raised` the λ that were raised to measure what sites can spare; data
    given in Python are not in `recipe`. At a prompt it is a few lines (`summary`), in a notebook a table with plots. It
    pickles, with what the model's own class brings along."""

    recipe: Recipe
    source: dict[str, Any]
    calibration: dict[str, Any] | None
    results: list[SiteResult]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    widths: WidthPlan
    affine: bool
    format: WrittenFormat
    trained: list[Training] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    candidates: list[dict[str, Any]] | None = None
    raised: dict[str, list[float]] = field(default_factory=dict)
    reopened: dict[str, Any] | None = None
    output: str | None = None
    model: Any = None
    phases: dict[str, float] = field(default_factory=dict)
    profile: Profile = field(default_factory=Profile)
    planned: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> list[dict[str, Any]]:
        """One entry per site, in execution order, of plain values: `pandas.DataFrame(report.sites)` is a table of them.

        name, kind, before and after (widths), lambda and retries (the ridge, and how often it was raised), raised (the
        ridge asked for and the one it took, where that was another), rcond (of the equations), error_before and
        error_after (of the consumer's output, without and with the repair, as shares of its energy; towards the stream
        what is left to the dense one, as shares of what was missing before the consumer), effective_rank,
        alpha, held_out_errors and sweeps (of --target stream; stream_lambda where the part towards the stream has
        equations of its own, in networks held in memory), damping (lambda and retries of a method that selects by
        a damped Gram matrix), trained: the layer was trained afterwards, so that the error is that of the weights it
        started from. None where there is no such thing."""
        trained = {training.layer for training in self.trained}
        return [site_entry(result, result.site.layer in trained) for result in self.results]

    @property
    def ratio(self) -> dict[str, dict[str, float | None]]:
        """By kind of site, "heads" and "channels", the share of widths asked to be removed (None under one ratio for
        the whole network) and the share reached; "overall" the same weighted by parameters."""
        found: dict[str, dict[str, float | None]] = {}
        for kind in sorted({r.site.kind for r in self.results}):
            results = [r for r in self.results if r.site.kind == kind]
            before = sum(r.site.units.width for r in results)
            after = sum(r.reduction.kept_width if r.reduction else r.site.units.width for r in results)
            pooled = self.widths.needs_scores and self.widths.asked.overall is not None
            asked = None if pooled else self.widths.asked.by_kind[kind]
            found[kind] = {"asked": asked, "reached": 1 - after / before}
        before, after = (sum(self._site_parameters(r, narrow) for r in self.results) for narrow in (False, True))
        found["overall"] = {"asked": self.widths.asked.overall, "reached": 1 - after / before}
        return found

    def _site_parameters(self, result: SiteResult, narrow: bool) -> int:
        width = result.reduction.kept_width if narrow and result.reduction else result.site.units.width
        return width // result.site.units.size * self.widths.costs[result.site.name]

    @property
    def loads_with(self) -> str:
        return self.format.loads_with

    @property
    def class_changed(self) -> str | None:
        return self.format.class_changed

    def to_json(self) -> dict[str, Any]:
        """The content of grail.json as plain values that json.dumps takes: recipe, versions, source, calibration,
        sites, ratios, parameters, bytes, evaluation and what opens the result. Equal for equal runs: times and the
        machine are in `run_json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe.to_json(),
            "versions": versions(),
            "source": self.source,
            "calibration": self.calibration,
            "sites": self.sites,
            "allocation": self.widths.allocation,
            "allocation_raised": self.raised,
            "bias": self.affine,
            "ratio": self.ratio,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes": {"before": self.bytes[0], "after": self.bytes[1]},
            "evaluation": self.evaluation,
            "alpha_search": self.candidates,
            "regional": [vars(training) for training in self.trained],
            "format": self.format.name,
            "tensor_parallel": self.format.tensor_parallel,
            "original_widths": self.format.original_widths,
            "loads_with": self.loads_with,
            "class_changed": self.class_changed,
        }

    def run_json(self) -> dict[str, Any]:
        """run.json: what differs between equal runs; from both report.html is made (grail.page)."""
        return machine_json() | {
            "seconds": {name: round(seconds, 3) for name, seconds in self.phases.items()},
            "profile": self.profile.to_json(),
            "planned": self.planned,
            "peak_memory_bytes": max(self.profile.peak, peak_memory()),
            "reopened": self.reopened,
        }


def machine_json() -> dict[str, Any]:
    """Where a run took place."""
    return {
        "schema_version": SCHEMA_VERSION,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "argv": sys.argv,
    }


def versions(*more: str) -> dict[str, str]:
    """Versions of what computes, and of Python (the built-in text is part of it); and of more packages."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def site_entry(result: SiteResult, trained: bool) -> dict[str, Any]:
    """A site as grail.json has it."""
    width = result.site.units.width
    entry: dict[str, Any] = {"name": result.site.name, "kind": result.site.kind, "before": width, "after": width}
    if result.reduction is not None:
        entry["after"] = result.reduction.kept_width
    done = result.compensation
    figures: dict[str, Any] = {
        "lambda": done and done.lam,
        "retries": done.retries if done else 0,
        "raised": done and done.raised and list(done.raised),
        "rcond": done.rcond if done and math.isfinite(done.rcond) else None,
        "error_before": done and done.error_before,
        "error_after": done and done.error_after,
        "effective_rank": done and done.effective_rank,
        "alpha": done and done.alpha,
        "stream_lambda": done and done.stream_lam,
        "held_out_errors": done and done.held_out and list(done.held_out),
        "sweeps": done and done.sweeps and [dict(zip(SWEEP, one, strict=True)) for one in done.sweeps],
        "damping": result.damping and {"lambda": result.damping.lam, "retries": result.damping.retries},
        "trained": trained and result.reduction is not None,
    }
    return entry | figures
